"""A compiler for tests: it traces as inductor would, compiles nothing, and notes what it was given."""

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from wan_scale import speed


class Counting:
    """Stands for speed's compiled forward: `forward` and `backward` hold, for every graph, how many attentions are
    computed in it.
    """

    def __init__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.forward, self.backward = [], []
        noting = {"fw_compiler": self.noting(self.forward), "bw_compiler": self.noting(self.backward)}
        backend = aot_autograd(**noting, partition_fn=min_cut_rematerialization_partition)
        speed.compiled_forward = torch.compile(speed.forward, dynamic=False, backend=backend)

    def noting(self, graphs):
        def compiler(graph, inputs):
            called = [
                op
                for node in graph.graph.nodes
                for op in (node.target, *node.args)
                if isinstance(op, torch._ops.OpOverload)
            ]
            # or an argument: under a kept RNG
            graphs.append(sum("attention" in str(op) and "backward" not in str(op) for op in called))
            return make_boxed_func(graph.forward)

        return compiler

    @property
    def breaks(self) -> dict:
        """Why a block was cut in pieces, by reason."""
        return dict(torch._dynamo.utils.counters["graph_break"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        speed.compiled_forward = None
        torch._dynamo.reset()
