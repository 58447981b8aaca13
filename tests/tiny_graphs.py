"""Small convolutional detectors as ONNX graphs, with what quantization and inspection meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from edgesight.models.spec import ModelSpec
from onnx import TensorProto, helper, numpy_helper

SIZE = 64
CLASSES = ("bright", "dark")
SPEC = ModelSpec(
    head="yolox",
    input_hw=(SIZE, SIZE),
    classes=CLASSES,
    strides=(8,),
    color="rgb",
    mean=(100.0, 110.0, 120.0),
    std=(50.0, 60.0, 70.0),
    resize="stretch",
    name="tiny graph",
)


class GraphBuilder:
    """Adds nodes one after the other; each call returns the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.stored: list[Any] = []

    def store(self, name: str, value: npt.NDArray[Any]) -> str:
        self.stored.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, inputs: list[str], count: int = 1, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        outputs = [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        self.nodes.append(
            helper.make_node(op, inputs, outputs, f"n{len(self.nodes)}", **attributes)
        )
        return name

    def conv(
        self,
        source: str,
        channels: tuple[int, int],
        kernel: int = 1,
        stride: int = 1,
        group: int = 1,
        uneven: float = 0.0,
    ) -> str:
        """``uneven``: spread (log10) of the output channels' scales."""
        before, after = channels
        fan = before // group * kernel**2
        weight = self.rng.normal(0, 1.4 / np.sqrt(fan), (after, before // group, kernel, kernel))
        bias = self.rng.normal(0, 0.1, after)
        scale = 10 ** self.rng.uniform(-uneven, uneven, after)
        number = len(self.nodes)
        names = [
            self.store(f"w{number}", (weight * scale[:, None, None, None]).astype(np.float32)),
            self.store(f"b{number}", (bias * scale).astype(np.float32)),
        ]
        pad = kernel // 2
        return self.add(
            "Conv",
            [source, *names],
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            group=group,
        )

    def silu(self, source: str) -> str:
        return self.add("Mul", [source, self.add("Sigmoid", [source])])

    def leaky(self, source: str) -> str:
        return self.add("LeakyRelu", [source], alpha=0.1)

    def relu(self, source: str) -> str:
        return self.add("Relu", [source])

    def relu6(self, source: str) -> str:
        number = len(self.nodes)
        ends = [self.store(f"c{number}_{v}", np.array(v, np.float32)) for v in (0, 6)]
        return self.add("Clip", [source, *ends])

    def shuffle(self, source: str, channels: int, side: int) -> str:
        number = len(self.nodes)
        split = np.array([1, 2, channels // 2, side, side], np.int64)
        whole = np.array([1, channels, side, side], np.int64)
        grouped = self.add("Reshape", [source, self.store(f"s{number}", split)])
        turned = self.add("Transpose", [grouped], perm=[0, 2, 1, 3, 4])
        return self.add("Reshape", [turned, self.store(f"r{number}", whole)])

    def model(self, output: str, shape: list[int], opset: int = 17) -> Any:
        self.nodes.append(helper.make_node("Identity", [output], ["output"], "last"))
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
            self.stored,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 8
        onnx.checker.check_model(model)
        return model


def detector(activation: str = "silu", uneven: float = 0.0, seed: int = 0) -> Any:
    """A YOLOX-shaped detector with residual, concatenation, shuffle, split and depthwise parts."""
    b = GraphBuilder(seed)
    act = {"silu": b.silu, "leaky": b.leaky, "relu": b.relu, "relu6": b.relu6}[activation]
    x = act(b.conv("images", (3, 16), 3, 2, uneven=uneven))
    x = act(b.conv(x, (16, 16), 3, 2, group=16, uneven=uneven))
    left = act(b.conv(x, (16, 16), uneven=uneven))
    right = b.add("Add", [act(b.conv(left, (16, 16), 3, uneven=uneven)), left])
    x = b.add("Concat", [right, x], axis=1)
    x = b.shuffle(x, 32, SIZE // 4)
    halves = b.add("Split", [x], count=2, axis=1)
    x = act(b.conv(f"{halves}_0", (16, 16), uneven=uneven))
    x = b.add("Concat", [x, f"{halves}_1"], axis=1)
    x = act(b.conv(x, (32, 32), 3, 2, uneven=uneven))
    box, thing, kind = b.conv(x, (32, 4)), b.conv(x, (32, 1)), b.conv(x, (32, 2))
    scores = [b.add("Sigmoid", [thing]), b.add("Sigmoid", [kind])]
    x = b.add("Concat", [box, *scores], axis=1)
    x = b.add("Reshape", [x, b.store("flat", np.array([1, 7, 64], np.int64))])
    return b.model(b.add("Transpose", [x], perm=[0, 2, 1]), [1, 64, 7])


def run(model: Any, tensor: npt.NDArray[Any], outputs: list[str] | None = None) -> list[Any]:
    """Runs a model in ONNX Runtime without any optimisation."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: list[Any] = session.run(outputs, {session.get_inputs()[0].name: tensor})
    return result


def weights(model: Any) -> dict[str, npt.NDArray[Any]]:
    """Returns the stored tensors by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
