"""The ``bundle`` command: makes one file of all that a board needs, or shows what one holds."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ..models.arguments import whole_number
from ..models.errors import InputError
from ..models.files import sha256
from ..models.zoo import MODEL_HELP, model_path
from . import bundle_sign, bundle_wheels, golden
from .bundle import Contents, write_bundle
from .bundle_open import Bundle, open_bundle
from .manifest import FOLDERS, PHOTOS, SUFFIX

DESCRIPTION = f"""\
Packs a model with what belongs to it into one file (*{SUFFIX}): the model, its float reference,
golden photos with boxes, the recipe and reports, and with --offline the wheels that install
edgesight on a board without a network. The same inputs give the same bytes; every file is listed
with its SHA-256 in the bundle's manifest, which --sign signs. --show checks a bundle, all of it,
and prints what it holds."""
EXAMPLE = (
    f"edgesight bundle small.onnx -o small{SUFFIX} --reference big.onnx --golden my_photos "
    "--offline --target pi-bookworm"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="OUT",
        help=f"the bundle to write (default: MODEL's name with {SUFFIX}, here)",
    )
    parser.add_argument("--name", help="of the model, for people (default: MODEL's file name)")
    parser.add_argument(
        "--reference", metavar="M", help="float model to compare with on the board; or a word"
    )
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="DATA",
        help="photos to judge the model by: a folder with instances.json (COCO format), a COCO "
        "JSON file, or a folder of photos, whose boxes the reference or else the model draws",
    )
    parser.add_argument(
        "--golden-limit",
        type=whole_number(1, FOLDERS[PHOTOS].count_max),
        default=golden.LIMIT,
        metavar="N",
        help=f"photos at most, spread evenly over the data (default {golden.LIMIT})",
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML it was compressed with")
    parser.add_argument(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a report to take along; may be given several times",
    )
    wheels = parser.add_argument_group("for boards without a network")
    wheels.add_argument("--offline", action="store_true", help="take the wheels along")
    wheels.add_argument("--target", metavar="BOARD", help=bundle_wheels.TARGET_HELP)
    wheels.add_argument(
        "--wheels", type=Path, metavar="DIR", help="choose them from a folder, not from the network"
    )
    keys = parser.add_argument_group("signature (ed25519; needs the extra sign)")
    keys.add_argument("--sign", type=Path, metavar="KEY.pem", help="private key to sign with")
    keys.add_argument(
        "--trust", type=Path, metavar="KEY.pub", help="with --show: refuse what it has not signed"
    )
    keys.add_argument(
        "--new-key",
        type=Path,
        metavar="KEY.pem",
        help=f"only make a key for --sign, and KEY.pem{bundle_sign.PUBLIC_SUFFIX} for --trust",
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="only check a bundle and print what is inside"
    )
    parser.add_argument(
        "--check-model", action="store_true", help="with --show: also run its models once"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _check_together(args)
    if args.new_key is not None:
        public_path = bundle_sign.make_keys(args.new_key)
        row = {"private": str(args.new_key), "public": str(public_path)}
        said = f"saved {args.new_key} (keep it secret) and {public_path} (for boards)"
        print(json.dumps(row) if args.json else said)
        return 0
    if args.show is not None:
        bundle = open_bundle(args.show, trusted_key=args.trust, check_model=args.check_model)
        bundle.check()
    else:
        bundle = _write(args)
    row = _row(bundle)
    print(json.dumps(row) if args.json else _table(row))
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Refuses options that do not go together.

    Raises:
        InputError: One that has no meaning here, or one that is missing.
    """
    jobs = [args.model is not None, args.show is not None, args.new_key is not None]
    if sum(jobs) != 1:
        message = f"expected one of MODEL, --show and --new-key, found {sum(jobs)}; see --help"
        raise InputError(message)
    wrong = [
        (args.trust is not None and args.show is None, "--trust", "--show"),
        (args.check_model and args.show is None, "--check-model", "--show"),
        (args.sign is not None and args.model is None, "--sign", "MODEL"),
        (args.target is not None and not args.offline, "--target", "--offline"),
        (args.wheels is not None and not args.offline, "--wheels", "--offline"),
        (args.offline and args.target is None, "--offline", "--target"),
        (args.offline and args.model is None, "--offline", "MODEL"),
    ]
    for found, option, partner in wrong:
        if found:
            message = f"{option}: expected {partner} with it, found none; add it, or leave it out"
            raise InputError(message)


def _write(args: argparse.Namespace) -> Bundle:
    model = model_path(args.model)
    target = args.out or Path(model.stem + SUFFIX)
    reference = None if args.reference is None else model_path(args.reference)
    board = None if args.target is None else bundle_wheels.parse_target(args.target)
    with tempfile.TemporaryDirectory(prefix="edgesight-") as folder:
        wheels = None
        if board is not None:
            wheels = bundle_wheels.gather(board, Path(folder), args.wheels)
        contents = Contents(
            model=model,
            reference=reference,
            photos=args.golden,
            limit=args.golden_limit,
            recipe=args.recipe,
            reports=tuple(args.report),
            wheels=wheels,
            name=args.name or "",
        )
        write_bundle(target, contents, key=args.sign)
    return open_bundle(target)


def _row(bundle: Bundle) -> dict[str, Any]:
    signature = "trusted" if bundle.trusted else "unchecked" if bundle.signature else None
    return {
        "bundle": str(bundle.path),
        "bytes": bundle.path.stat().st_size,
        "sha256": sha256(bundle.path),
        "signature": signature,
        "manifest": bundle.manifest.to_dict(),
    }


def _table(row: dict[str, Any]) -> str:
    said = row["manifest"]
    spec, golden_row, target = said["spec"], said["golden"], said["target"]
    signature = {
        "trusted": "by the trusted key",
        "unchecked": "there, not checked (give --trust KEY.pub)",
        None: "none",
    }[row["signature"]]
    height, width = spec["input_hw"]
    lines = [
        f"{row['bundle']}: {row['bytes'] / 1e6:.1f} MB, checked",
        "",
        f"  {'name':10} {said['name']}",
        f"  {'model':10} {spec['head']}, {width}x{height}, {len(spec['classes'])} classes",
        f"  {'edgesight':10} {said['edgesight']}",
        f"  {'signature':10} {signature}",
        f"  {'SHA-256':10} {row['sha256']}",
    ]
    if golden_row:
        drawn = {"labels": "labelled", "reference": "drawn by the reference"}
        by = drawn.get(golden_row["source"], "drawn by the model itself")
        lines.append(f"  {'golden':10} {golden_row['data']}, {golden_row['boxes']} boxes {by}")
    if target:
        lines.append(
            f"  {'wheels':10} for {target['name']}: Python {target['python']}, "
            f"{target['machine']}, glibc 2.{target['glibc']} or newer"
        )
    lines.append("")
    photos = [entry for entry in said["files"] if entry["path"].startswith(f"{PHOTOS}/")]
    for entry in said["files"]:
        if entry not in photos:
            lines.append(f"  {entry['size']:>11}  {entry['path']}")
    if photos:
        total = sum(entry["size"] for entry in photos)
        lines.append(f"  {total:>11}  {PHOTOS}/ ({len(photos)} photos)")
    return "\n".join(lines)
