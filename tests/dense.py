"""The model and the SparseX algorithm once more, dense and slow: no pages, no plan, no chunks, no loops on the device.

It follows section 3 of `sparsex_jax/reuse/README.md`, with one array of keys and one of values for each layer. It is
independent of the package, of which it takes only the parameter layout.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparsex_jax.model.store import kv_of


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def frequencies_of(config, layer):
    """Of the pairs (i, i + d/2) in this layer, radians a position; 0 for those that are not rotated."""
    is_local = config.rope_local_theta is not None and config.windows[layer] is not None
    theta, half = config.rope_local_theta if is_local else config.rope_theta, config.head_dim // 2
    dim = config.rotary_dim or config.head_dim
    freq = np.zeros(half)
    freq[: dim // 2] = theta ** (-np.arange(0, dim, 2) / dim)
    if config.rope_factors is not None and not is_local:
        freq[: dim // 2] /= np.array(config.rope_factors)
    return freq


def _rotate(x, positions, config, layer):
    """Rotate pairs (i, i + d/2) as complex numbers, in this layer."""
    freq, half = frequencies_of(config, layer), config.head_dim // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None, None] * freq)
    return np.concatenate([turned.real, turned.imag], -1)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@dataclasses.dataclass
class Dense:
    """Float64 forward passes of one model."""

    config: object
    params: object

    def __post_init__(self):
        self.embed = np.asarray(self.params.embed, np.float64)
        self.layers = [
            {name: np.asarray(w[layer], np.float64) for name, w in vars(self.params.layers).items() if w is not None}
            for layer in range(self.config.num_layers)
        ]

    def embedded(self, tokens):
        return self.embed[tokens] * (self.config.embedding_scale or 1)

    def qkv(self, layer, hidden, positions):
        w, eps = self.layers[layer], self.config.rms_norm_eps
        x = _norm(hidden, w["attn_norm"], eps)
        q, k, v = (np.einsum("th,hnd->tnd", x, w[f"w{n}"]) + w.get(f"b{n}", 0) for n in "qkv")
        if self.config.wide_qk_norm:
            q, k = (
                _norm(x.reshape(len(x), -1), w[f"wide_{n}_norm"].ravel(), eps).reshape(x.shape)
                for x, n in ((q, "q"), (k, "k"))
            )
        if self.config.qk_norm:
            q, k = _norm(q, w["q_norm"], eps), _norm(k, w["k_norm"], eps)
        q, k = (_rotate(x, positions, self.config, layer) for x in (q, k))
        return q, k, v

    def scores(self, q, keys):
        """As transformers has them: the factor is on the rotated part of queries and of keys, here on their product."""
        half, pairs = self.config.head_dim // 2, (self.config.rotary_dim or self.config.head_dim) // 2
        factor = np.where(np.arange(2 * half) % half < pairs, self.config.rope_attention_factor, 1)
        scale = np.sqrt(self.config.query_scalar or self.config.head_dim)
        return np.einsum("rnd,tnd->nrt", q * factor, keys * factor) / scale

    def weights(self, layer, q, keys, rows):
        """Causal attention [heads, rows, keys] of rows at these places among the keys."""
        repeat = q.shape[1] // keys.shape[1]
        scores = self.scores(q, np.repeat(keys, repeat, 1))
        ahead = np.asarray(rows)[:, None] - np.arange(len(keys))
        scores = np.where((ahead >= 0) & (ahead < (self.config.windows[layer] or np.inf)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True)

    def finish_layer(self, layer, hidden, q, keys, values, rows):
        w = self.layers[layer]
        values = np.repeat(values, q.shape[1] // values.shape[1], 1)
        attended = np.einsum("nrt,tnd->rnd", self.weights(layer, q, keys, rows), values)
        out, eps = np.einsum("rnd,ndh->rh", attended, w["wo"]), self.config.rms_norm_eps
        hidden = hidden + (_norm(out, w["post_attn_norm"], eps) if self.config.post_norms else out)
        x = _norm(hidden, w["mlp_norm"], eps)
        out = np.stack([self.experts(w, row) for row in x]) if self.config.num_experts else self.gated(w, x)
        return hidden + (_norm(out, w["post_mlp_norm"], eps) if self.config.post_norms else out)

    def gated(self, w, x, prefix="w_"):
        return (ACTIVATIONS[self.config.activation](x @ w[prefix + "gate"]) * (x @ w[prefix + "up"])) @ w[
            prefix + "down"
        ]

    def experts(self, w, row):
        """The weighted sum over one row's experts."""
        share = np.exp(row @ w["router"])
        share /= share.sum()
        chosen = np.argsort(-share)[: self.config.experts_per_token]
        if self.config.normalise_top_k:
            share = share / share[chosen].sum()
        own = ({name: w[name][n] for name in w if name.startswith("expert_")} for n in chosen)
        return sum(share[n] * self.gated(one, row, "expert_") for n, one in zip(chosen, own, strict=True))

    def logits(self, hidden):
        x = _norm(hidden, np.asarray(self.params.final_norm, np.float64), self.config.rms_norm_eps)
        raw = x @ (self.embed.T if self.config.tied_embeddings else np.asarray(self.params.lm_head, np.float64))
        cap = self.config.final_softcap
        return raw if cap is None else np.tanh(raw / cap) * cap

    def full(self, tokens, first_position=0):
        """Logits of every token, and K and V of every layer, of a text alone at any position."""
        rows = np.arange(len(tokens))
        hidden, kv = self.embedded(tokens), []
        for layer in range(self.config.num_layers):
            q, keys, values = self.qkv(layer, hidden, rows + first_position)
            hidden = self.finish_layer(layer, hidden, q, keys, values, rows)
            kv.append((keys, values))
        return self.logits(hidden), kv

    def pasted(self, prompt):
        """KV of a prompt whose segments are pasted and aligned: `{layer: (keys, values)}`, zero where fresh.

        `prompt` is a list of (tokens, donor): donor None, or the text it is cut from and the offset in it.
        """
        total = sum(len(tokens) for tokens, _ in prompt)
        shape = (total, self.config.num_kv_heads, self.config.head_dim)
        out = [(np.zeros(shape), np.zeros(shape)) for _ in range(self.config.num_layers)]
        at = 0
        for tokens, donor in prompt:
            if donor is not None:
                text, offset = donor
                old = self.full(text)[1]
                for layer, ((keys, values), (old_keys, old_values)) in enumerate(zip(out, old, strict=True)):
                    cut = slice(offset, offset + len(tokens))
                    shift = np.full(len(tokens), at - offset)
                    keys[at : at + len(tokens)] = _rotate(old_keys[cut], shift, self.config, layer)
                    values[at : at + len(tokens)] = old_values[cut]
            at += len(tokens)
        return out

    def sparsex(self, prompt, boundary, ratio, overflow, tail, second=None):
        """Logits of the last token, and the active tokens, step by step as in section 3.4."""
        tokens = np.concatenate([tokens for tokens, _ in prompt])
        reused = np.concatenate([np.full(len(tokens), donor is not None) for tokens, donor in prompt])
        ends_in_reuse = bool(reused[-1])
        reused[-1] = False
        total, kv = len(tokens), self.pasted(prompt)
        rows, hidden = np.arange(total), self.embedded(tokens)
        for layer in range(self.config.num_layers):
            keys, values = kv[layer]
            if layer == boundary:
                q, new_keys, new_values = self.qkv(layer, hidden, rows)
                keys[rows], values[rows] = new_keys, new_values
                mass = self.weights(layer, q[~reused], keys, rows[~reused]).sum((0, 1))
                active = self.active(reused, mass, ratio, overflow, tail if ends_in_reuse else 0, len(prompt[-1][0]))
                hidden, rows = hidden[active], rows[active]
            if layer == second:
                hidden, rows = hidden[~reused[rows]], rows[~reused[rows]]
            q, keys[rows], values[rows] = self.qkv(layer, hidden, rows)
            hidden = self.finish_layer(layer, hidden, q, keys, values, rows)
        return self.logits(hidden[-1:])[0], active

    def narrowed(self, prompt, steps):
        """Logits of the last token, K and V of each layer, and the places that each step keeps.

        `steps` is a list of (layer, choose), in order; `choose(layer, hidden, rows, kv)` gives the places that go on.
        """
        tokens = np.concatenate([tokens for tokens, _ in prompt])
        rows, hidden, kv, kept = np.arange(len(tokens)), self.embedded(tokens), self.pasted(prompt), []
        for layer in range(self.config.num_layers):
            for _, choose in [step for step in steps if step[0] == layer]:
                keep = np.isin(rows, choose(layer, hidden, rows, kv))
                rows, hidden = rows[keep], hidden[keep]
                kept.append(rows)
            keys, values = kv[layer]
            q, keys[rows], values[rows] = self.qkv(layer, hidden, rows)
            hidden = self.finish_layer(layer, hidden, q, keys, values, rows)
        return self.logits(hidden[-1:])[0], kv, kept

    def deviation(self, layer, hidden, rows, kv):
        """Squared change of K and V of some rows at a layer. The new ones replace the old."""
        _, keys, values = self.qkv(layer, hidden, rows)
        changes = [((new - old[rows]) ** 2).sum((1, 2)) for new, old in zip((keys, values), kv[layer], strict=True)]
        kv[layer][0][rows], kv[layer][1][rows] = keys, values
        return sum(changes)

    def masses(self, hidden, rows, kv, seen_by, layers, power=1):
        """Key mass [layers, keys], of powers of the attention: some of the rows look, all run through these layers."""
        out = []
        for layer in layers:
            keys, values = (x.copy() for x in kv[layer])
            q, keys[rows], values[rows] = self.qkv(layer, hidden, rows)
            watched = np.isin(rows, seen_by)
            out.append((self.weights(layer, q[watched], keys, rows[watched]) ** power).sum((0, 1)))
            hidden = self.finish_layer(layer, hidden, q, keys, values, rows)
        return np.array(out)

    @staticmethod
    def active(reused, mass, ratio, overflow, tail, last_segment):
        total = len(reused)
        forced = ~reused
        for place in np.flatnonzero(~reused):
            forced[max(place - overflow, 0) : place + overflow + 1] = True
        forced[total - min(tail, last_segment) :] = True
        others = np.flatnonzero(~forced)
        best = others[np.argsort(-mass[others], kind="stable")[: round(ratio * reused.sum())]]
        forced[best] = True
        return forced


def engine_logits(engine, tokens, **kwargs):
    return np.asarray(engine.prefill(np.asarray(tokens), **kwargs).logits)


def stored_kv(engine, slots):
    """K and V [layers, slots, heads, head_dim] that the engine's store holds in these slots."""
    page, offset = np.divmod(np.asarray(slots), engine.config.page_size)
    rows = kv_of(engine.runner.store)[:, jnp.asarray(page), :, :, jnp.asarray(offset)]
    return np.moveaxis(np.asarray(rows), 0, 1)[:, :, 0], np.moveaxis(np.asarray(rows), 0, 1)[:, :, 1]
