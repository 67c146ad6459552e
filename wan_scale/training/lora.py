"""--lora RANK: one frozen transformer under student, teacher and fake score, so that 14B trains on one GPU.

    teacher      Role(base): the base alone
    fake score   Role(base, "fake"): the base with a LoRA on every block
    student      graft(net, base, H): the base with a LoRA on its first L-H blocks; all else (last H blocks, embeddings,
                 output layer) is the student's own and trained in full

The LoRA layers are PEFT's. A mark on each layer says which adapter it uses. Activation checkpointing calls a block once
more in the backward pass, and by then another role may have left its own mark there. So no role switches the network.
Each role has its own view of every block, which sets the marks of that block at every call. PEFT's set_adapter would
also freeze the other role's weights: GRADIENTS LOST in silence.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from wan_scale.data.stored import Stored
from wan_scale.model import WanNetwork
from wan_scale.training import weights


def adapt(base: WanNetwork, rank: int, scale: float, depth: dict[str, int]) -> WanNetwork:
    """Freeze the base and put a fresh LoRA on every linear layer of its first depth[name] blocks.

    It changes nothing yet. RAISES ValueError where that is no block.
    """
    from peft import LoraConfig, inject_adapter_in_model

    modules = base.transformer.named_modules()
    linear = [path for path, m in modules if isinstance(m, nn.Linear) and path.startswith("blocks.")]
    for name, n in depth.items():
        if n < 1:
            none = f"of {len(base.blocks)} blocks none is left for the {name}'s adapter"
            raise ValueError(f"{none}; make the flow head (--H) shorter.")
        mine = [path for path in linear if int(path.split(".")[1]) < n]
        # choice: adapters act with 10 times B A, because at the rates of full training Adam moves a product of small
        # matrices slowly
        how = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=mine)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second adapter is meant
            inject_adapter_in_model(how, base.transformer, name)
    return base.requires_grad_(False)


class Adapted(nn.Module):
    """A block of the base as one role sees it: with the adapter `name`, or with none.

    Owns that adapter's weights and nothing else.
    """

    def __init__(self, block, name: str | None):
        from peft.tuners.lora import LoraLayer

        super().__init__()
        layers = {path: layer for path, layer in block.named_modules() if isinstance(layer, LoraLayer)}
        self.marks = [name] if name else []
        # used, not owned: not trained, not saved, not copied
        vars(self).update(block=block, layers=list(layers.values()))
        parts = lambda layer: nn.ModuleDict({"A": layer.lora_A[name], "B": layer.lora_B[name]})
        mine = {path.replace(".", "/"): parts(layer) for path, layer in layers.items() if name in layer.lora_A}
        self.adapter = nn.ModuleDict(mine)
        # PEFT makes them in the base's dtype: in bf16 a rate of 1e-5 would be rounded away
        self.float().requires_grad_(True)

    def forward(self, *args):
        for layer in self.layers:
            layer._active_adapter = self.marks
        return self.block(*args)

    def __deepcopy__(self, memo):
        return self  # tmd.TMDStudent copies the network it is given; the base exists once


class Role(WanNetwork):
    """The base in the contract of tmd.Network, with the adapter `name` or (the teacher) with none.

    Its parameters are the adapter's.
    """

    def __init__(self, base: WanNetwork, name: str | None = None):
        super().__init__(base.transformer)
        # checkpointing and the like
        vars(self).update({key: value for key, value in vars(base).items() if not key.startswith("_")})
        vars(self)["transformer"] = self._modules.pop("transformer")  # used, not owned
        self.adapted = nn.ModuleList(Adapted(block, name) for block in base.blocks)

    blocks = property(lambda self: self.adapted)


def graft(net: WanNetwork, base: WanNetwork, H: int) -> WanNetwork:
    """A student's network whose blocks before the last H are the base's with the adapter "student".

    The rest stays the student's own.
    """
    blocks = net.transformer.blocks
    for i in range(len(blocks) - H):
        blocks[i] = Adapted(base.blocks[i], "student")
    return net


def merge(student, device, base: dict[str, Stored], own: dict[str, Stored], scale: float):
    """Fill a student without LoRA with the weights it would have saved: the base's, the adapter added, and its own.

    base: the folder's transformer under the student's names. The sum is made in float32, a weight at a time.
    """
    factors = {name: s for name, s in own.items() if ".adapter." in name}
    plain, change = base | {name: s for name, s in own.items() if name not in factors}, {}
    for name in factors:
        if name.endswith(".B.weight"):
            weight = name.replace(".adapter.", ".").replace("/", ".").replace(".B.weight", ".weight")
            A, B = factors[name.replace(".B.weight", ".A.weight")], factors[name]
            add = lambda w, A=A, B=B: torch.addmm(w.float(), weights.read(B), weights.read(A), alpha=scale)
            change[weight] = add
    weights.check(student, plain)
    return weights.fill(student, device, plain, change)
