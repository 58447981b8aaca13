"""What a detector is: spec, boxes, pre- and post-processing, ONNX detector, metrics. No torch."""
