"""BD-LRU with a matrix for a state: columns share block-diagonal gates, and a query reads them out.

    z_t = W_z x_t + b_z      [A_t, k_t] = normalise(z_t) row by row      v_t = W_v x_t      q_t = W_q x_t
    S_t = A_t S_{t-1} + k_t v_t^T      y_t = S_t^T q_t      in each head
    out_t = W_o (norm(y_t) * silu(W_g x_t))

A head has K slots in blocks of M and V columns: K V numbers of state for K (M + 1) gates. With M = 1 it is
HGRN2 (arXiv 2404.07904). With `keys` a write has a signed address: k_t is multiplied by norm(W_u x_t), as the
keys of gated linear attention (arXiv 2312.06635); numbers of S may then exceed those of v. With `erase` too,
a write replaces what the state holds at its key, as in gated DeltaNet (arXiv 2412.06464):

    u_t = W_u x_t / |W_u x_t|    beta_t = sigmoid(W_b x_t + b_b), one a head    S'_t = A_t S_{t-1}
    S_t = S'_t + beta_t u_t (v_t - S'_t^T u_t)^T

k_t then only takes its share of the rows of [A_t, k_t], so that A_t forgets; M = 1 is Kimi Delta Attention's
rule (arXiv 2510.26692).

Legend: B batch, T time, D model width, H heads, K slots a head, M slots a block, V columns a head; W reach of
the convolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import matrix_scan
from ..kernels.gates import normalise
from .base import (
    BlockSize,
    GateName,
    HalfLives,
    JointProjections,
    Mixer,
    MixerCost,
    Reach,
    ResidualOutput,
    SequenceContext,
    check_sizes,
)
from .initial_gates import check_gates, gate_bias_of_half_lives, gate_matrix
from .short_conv import ShortConvolution

HALF_LIFE = (2.0, 512.0)  # in tokens, at the start
NORM_EPS = 1e-6


class BlockDiagonalMatrixLRU(JointProjections, Mixer):
    """Block-diagonal linear recurrent unit whose state is a matrix.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K.
        value_dim: V; None for K.
        block_size: M, which divides K.
        gate: name of the gate function, see `kernels.gates`.
        gate_std: initial standard deviation of the gate logits; None: W_z starts like any other matrix.
        half_life: [shortest, longest] initial half-life of a head's slots, in tokens, see `initial_gates`;
            None for [2, 512], or for equal gates where the gate function has no such start.
        short_conv: reach W in tokens of a short convolution of the input; None for none.
        head_conv: reach W in tokens of short convolutions of values, queries and keys in place of one of the
            input, and SiLU after them, as in gated DeltaNet. A key can then be that of the token before.
        shift_keys: n: keys start as the queries of the token before, so that a layer reads at first what
            followed earlier tokens like this one. Of n heads in turns the first compares one token, the
            second two, each in half of its slots, and so on to n. Needs `keys` and a `head_conv` above n.
        output_gate: whether to multiply outputs by silu(W_g x); None for yes.
        head_norm: whether to divide each head's output by its root mean square.
        keys: whether to multiply the write weights by keys W_u x of root mean square 1 in each head.
        erase: whether a write erases what the state holds at its key; needs `keys`.
        input_logit: whether the input gate has logits of its own, see `BlockDiagonalLRU`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        head_dim: int = 64,
        value_dim: int | None = None,
        block_size: BlockSize = 4,
        gate: GateName = "softmax",
        gate_std: float | None = None,
        half_life: HalfLives | None = None,
        short_conv: Reach | None = None,
        head_conv: Reach | None = None,
        shift_keys: int | None = None,
        output_gate: bool | None = None,
        head_norm: bool = True,
        keys: bool = False,
        erase: bool = False,
        input_logit: bool | None = None,
    ):
        super().__init__()
        check_sizes(
            num_heads=num_heads, head_dim=head_dim, value_dim=value_dim, block_size=block_size,
            short_conv=short_conv, head_conv=head_conv, shift_keys=shift_keys,
        )  # fmt: skip
        self.input_logit = input_logit is not False
        check_gates(gate, gate_std, half_life, self.input_logit)
        if head_dim % block_size:
            raise ValueError(f"head_dim {head_dim} does not split into blocks of block_size {block_size}")
        if short_conv and head_conv:
            raise ValueError(
                "short_conv convolves the input, head_conv what heads get of it: set one of them"
            )
        if erase and not keys:
            raise ValueError(
                "erase needs keys: a write erases what the state holds at its key; set keys: true"
            )
        if shift_keys and not (keys and shift_keys < (head_conv or 0)):
            raise ValueError(
                "shift_keys is a start of the keys' convolution: set keys: true and head_conv above "
                f"{shift_keys}"
            )
        H, K, V, M = num_heads, head_dim, value_dim or head_dim, block_size
        self.hidden_size, self.block_size, self.head_shape = hidden_size, M, (H, K, V)
        self.gate, self.gate_std = gate, gate_std
        self.half_life = half_life or (HALF_LIFE if gate in ("softmax", "sigmoid") else None)
        self.shift_keys = shift_keys
        self.backend = "auto"  # of the scan
        self.diagonal_only = False  # for a probe: read A_t without its off-diagonal entries
        self.gate_proj = nn.Linear(hidden_size, (M + self.input_logit) * H * K)
        self.value_proj = nn.Linear(hidden_size, H * V, bias=False)
        self.query_proj = nn.Linear(hidden_size, H * K, bias=False)
        self.key_proj = nn.Linear(hidden_size, H * K, bias=False) if keys else None
        self.rate_proj = nn.Linear(hidden_size, H) if erase else None
        self.output_gate_proj = None if output_gate is False else nn.Linear(hidden_size, H * V, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(H, V)) if head_norm else None
        self.out_proj = ResidualOutput(H * V, hidden_size, bias=False)
        self.conv = ShortConvolution(hidden_size, short_conv) if short_conv else None
        self.head_conv = ShortConvolution(H * (V + K + K * keys), head_conv) if head_conv else None
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D); state (B, H, K, V) in fp32, with a convolution of C channels
        (B, H K V + (W-1) C), its inputs after the recurrence's state."""
        context = SequenceContext.of(x, context)
        conv, past = self.conv if self.head_conv is None else self.head_conv, None
        if conv is not None:
            state, past = conv.split(state, self.head_shape)
        if self.conv is not None:
            x, past = self.conv(x, past, context.reset)
        gates, *streams = self.project(x, context.joint)
        if self.head_conv is not None:
            streams, past = self._convolved(list(streams), past, context.reset)
        y, state = self._mix(gates, list(streams), state, context.reset)
        return y, state if conv is None else conv.join(state, past)

    def _convolved(
        self, streams: list[Tensor], past: Tensor | None, reset: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Values, queries and keys after their convolutions; the other projections as they are."""
        count = 2 if self.key_proj is None else 3
        mixed, past = self.head_conv(torch.cat(streams[:count], dim=-1), past, reset)
        mixed = functional.silu(mixed).split([stream.shape[-1] for stream in streams[:count]], dim=-1)
        return [*mixed, *streams[count:]], past

    def _mix(
        self, gates: Tensor, streams: list[Tensor], state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence and what follows, of the projections; state (B, H, K, V)."""
        H, K, V = self.head_shape
        values, queries, more = streams[0], streams[1], streams[2:]
        transitions, writes = self._coefficients(gates)
        erase = None
        if self.key_proj is not None:
            keys = more.pop(0).unflatten(-1, (H, K)).to(writes.dtype)
            keys = functional.rms_norm(keys, (K,), eps=NORM_EPS)
            if self.rate_proj is not None:
                erase = keys * K**-0.5
                writes = more.pop(0).to(keys.dtype).sigmoid().unsqueeze(-1) * erase
            else:
                writes = writes * keys
        y, state = matrix_scan(
            transitions, writes, values.unflatten(-1, (H, V)), queries.unflatten(-1, (H, K)), state, reset,
            self.backend, erase,
        )  # fmt: skip
        if self.norm_weight is not None:
            y = functional.rms_norm(y, (V,), eps=NORM_EPS) * self.norm_weight.to(y.dtype)
        y = y.flatten(2)
        if more:
            y = y * functional.silu(more[0])
        return self.out_proj(y), state

    def joint_projections(self) -> list[nn.Linear]:
        optional = (self.key_proj, self.rate_proj, self.output_gate_proj)
        return [self.gate_proj, self.value_proj, self.query_proj, *(p for p in optional if p is not None)]

    def _coefficients(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, gates H K) as A (B, T, H, K, M) and k (B, T, H, K), views of M + 1 planes in fp32."""
        # fp32 because bf16 has no number between 0.996 and 1, where slow decay rates lie.
        H, K, _ = self.head_shape
        M = self.block_size
        planes = gates.unflatten(-1, (-1, H, K))
        if not self.input_logit:
            planes = functional.pad(planes, (0, 0, 0, 0, 0, 1))
        p = normalise(planes if planes.dtype == torch.float64 else planes.float(), self.gate, dim=2)
        if self.diagonal_only:
            own = torch.arange(K, device=p.device) % M == torch.arange(M, device=p.device).unsqueeze(1)
            p = torch.cat([p[:, :, :M] * own.unsqueeze(1), p[:, :, M:]], dim=2)
        return p[:, :, :M].permute(0, 1, 3, 4, 2), p[:, :, M]

    def planes(self) -> dict[str, int]:
        return {"gate_proj.weight": self.block_size + self.input_logit}

    def transitions(self, x: Tensor) -> Tensor:
        """A_t (B, T, H K / M, M, M) in fp32, head after head."""
        if self.conv is not None:
            x, _ = self.conv(x, None, None)
        A, _ = self._coefficients(self.gate_proj(x))
        return A.flatten(2, 3).unflatten(2, (-1, self.block_size))

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """The matrix and bias of the gates by `gate_std` and `half_life`; convolution and norm."""
        H, K, V = self.head_shape
        values = gate_matrix(self.gate_proj, self.gate_std)
        if self.half_life is not None:
            bias = gate_bias_of_half_lives(K, self.block_size, self.half_life)  # (K, M+1)
            bias = bias if self.input_logit else bias[:, :-1] - bias[:, -1:]
            values["gate_proj.bias"] = bias.T.unsqueeze(1).expand(-1, H, -1).flatten()
        for name, conv in (("conv", self.conv), ("head_conv", self.head_conv)):
            if conv is not None:
                values[f"{name}.weight"] = torch.zeros_like(conv.weight, device="cpu")
        if self.norm_weight is not None:
            values["norm_weight"] = torch.ones(H, V)
        if self.shift_keys:  # as an induction head: what stands beside x_{t-1} is found by x_t
            values["query_proj.weight"] = std * torch.randn(H * K, self.hidden_size)
            values["key_proj.weight"] = values["query_proj.weight"]
            taps = values["head_conv.weight"][:, H * V :].unflatten(1, (2, H, K))  # of queries and keys
            taps[0] = -1.0  # the convolution adds to its input
            for head in range(H):
                compared = head % self.shift_keys + 1
                for lag, share in enumerate(torch.arange(K, device="cpu").tensor_split(compared)):
                    taps[lag, 0, head, share] += 1.0
                    taps[lag + 1, 1, head, share] += 1.0
        return values

    def cost(self, context_length: int) -> MixerCost:
        """A number of the state is M + 1 multiply-adds and one to be read, and one more to be erased;
        normalising gates is about 3 operations each."""
        H, K, V = self.head_shape
        taps = sum(conv.weight.numel() for conv in (self.conv, self.head_conv) if conv is not None)
        gates = self.block_size + 1
        uses = gates + (1 if self.rate_proj is None else 2)
        return MixerCost(products=2 * taps, scan=H * K * (2 * V * uses + 3 * gates))

    def state_elements(self, context_length: int) -> int:
        H, K, V = self.head_shape
        kept = sum(conv.elements for conv in (self.conv, self.head_conv) if conv is not None)
        return H * K * V + kept
