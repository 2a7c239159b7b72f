"""The Q-network: a pretrained causal LM that says what the next token is worth.

`lm`      Q(s, a) = V(s) + beta [log pi(a|s) - log pi_ref(a|s)]. The LM's own output layer carries the advantage, a
          small head on the hidden state carries V. Because pi is normalised, beta log sum_a pi_ref exp(Q / beta) = V
          exactly: a soft maximum that costs nothing. Acting by pi_ref exp(Q / beta) is sampling from the LM.
`linear`  Q(s, a) = w_a . h(s) + b, the textbook head, acting by prior * exp(Q / beta), the prior being the LM's own
          output layer on the same hidden state.

B episodes, L padded length, T actions, N action positions, H hidden size, V tokens that may be chosen.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_dqn import models
from llm_dqn.adapters import AdapterRoles, CopyRoles, LoraConfig, Role, targets_head
from llm_dqn.errors import UserError
from llm_dqn.heads import (
    ActingHead,
    LinearQHead,
    ValueHead,
    base_choices,
    chunk_for,
    logprobs_and_rank,
    logsumexp_q,
    map_states,
    reduce_states,
    taken_logprobs,
)
from llm_dqn.states import action_states, split_values, spread, visited_states
from llm_dqn.targets import soft_value
from llm_dqn.types import PrefixBatch, QOutput, TokenBatch, TokenLook

# (q_values (N, V), log_prior (N, V), online q_values (N, V)) -> values (N,): a rule of `targets`
Backup = Callable[[Tensor, Tensor, Tensor], Tensor]


class QNetwork(nn.Module):
    """Online network, target network and reference policy on one base model.

    num_tokens: rows of the output layer that may be chosen; padded rows beyond them get no probability and no value.
    backup: how Q-values make a state's value; None takes V from the value head, which for `lm` is the soft value.
    lora: a new adapter's settings, or the path of a saved one that only writes. None tunes all weights, and keeps
    copies of the model as reference and target; `tuned` are weights from such a run (`model` itself: none).
    needs_logprobs: whether `forward` also gives log pi(a|s), which a linear head can do without.
    bf16: the trunk runs in bfloat16 autocast; Q, targets and losses stay float32.
    target: "adapter" lags adapter and heads; "head" lags the heads only, on a trunk that moves under them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_tokens: int,
        *,
        q_head: Literal["lm", "linear"] = "lm",
        beta: float = 0.1,
        lora: LoraConfig | str | None = None,
        tuned: PreTrainedModel | None = None,
        target: Literal["adapter", "head"] = "adapter",
        backup: Backup | None = None,
        needs_value_head: bool = False,
        needs_logprobs: bool = True,
        uniform_prior: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        models.verify_head_shortcut(model)
        self.head_name = _name_of(model, models.lm_head(model))
        self.base_name = str(model.name_or_path)
        self.num_tokens, self.kind, self.beta = num_tokens, q_head, beta
        self.backup, self.uniform_prior = backup, uniform_prior
        self.needs_logprobs, self.bf16 = needs_logprobs, bf16
        self.is_base = tuned is model  # nothing is tuned: one pass answers for both policies
        self._folded = q_head == "linear" and (isinstance(lora, str) or tuned is not None)  # as `save_policy` leaves it
        self._postprocess = models.head_postprocess(model)
        if q_head == "linear" and not _is_identity(self._postprocess, models.lm_head(model)):
            raise UserError(
                f"dqn.q_head: linear adds Q / beta to the logits, and {type(model).__name__} changes its logits "
                "afterwards (softcap, scale or bias); use q_head: lm"
            )
        if q_head == "linear" or targets_head(lora, self.head_name):
            models.untie_head(model)
        hidden_size = models.lm_head(model).in_features
        heads: dict[str, nn.Module] = {}
        if q_head == "linear":
            heads["q"] = LinearQHead(hidden_size, num_tokens)
        if q_head == "lm" or needs_value_head:
            heads["value"] = ValueHead(hidden_size)
        self.heads = nn.ModuleDict(heads)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.roles = CopyRoles(model, target, tuned) if lora is None else AdapterRoles(model, lora, target)
        self.model = self.roles.model
        self.to(next(model.parameters()).device)

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is tuned rather than all weights."""
        return isinstance(self.roles, AdapterRoles)

    # --- hidden states and logits ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.heads.parameters()).device

    @property
    def full_precision(self) -> bool:
        """Whether the trunk computes in float32."""
        return not self.bf16 and all(p.dtype == torch.float32 for p in self.model.parameters())

    def _precision(self) -> torch.autocast | nullcontext[None]:
        # Reference, target and online must round alike, or the policy starts a rounding error away from the reference.
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def _hidden(self, tokens: TokenBatch, role: Role) -> Tensor:
        """(B, L, H) of the trunk in the given role."""
        # Only the pass that learns may drop units or checkpoint activations; it keeps the mode through its backward.
        self.model.train(role == "online" and torch.is_grad_enabled())
        with self.roles.acting_as(role) as plain, self._precision():
            trunk = models.trunk(plain)
            return trunk(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
            ).last_hidden_state

    def _lm_logits(self, hidden: Tensor, role: Role) -> Tensor:
        """(N, H) -> (N, V) float32: what the LM of that role says of every token that may be chosen."""
        with self.roles.acting_as(role) as plain, self._precision():
            return self._chosen_rows(models.lm_head(plain)(hidden))

    def _chosen_rows(self, logits: Tensor) -> Tensor:
        """What an output layer gives, as float32 logits of the tokens that may be chosen."""
        return self._postprocess(logits)[..., : self.num_tokens].float()

    def _value_head(self, role: Role) -> ValueHead:
        return (self.target_heads if role == "target" else self.heads)["value"]  # type: ignore[return-value]

    def _q_head(self, role: Role) -> LinearQHead:
        return (self.target_heads if role == "target" else self.heads)["q"]  # type: ignore[return-value]

    def _acting_logits(self, hidden: Tensor, role: Role) -> Tensor:
        """(N, H) -> (N, V) logits of the policy that acts in that role."""
        if self.kind == "lm" or role == "reference" or self._folded:
            return self._lm_logits(hidden, role)
        scaled_q = self._q_head(role)(hidden) / self.beta
        return scaled_q if self.uniform_prior else self._lm_logits(hidden, role) + scaled_q

    def _taken_logprobs(self, states: Tensor, tokens: TokenBatch, role: Role) -> Tensor:
        """(N,) log pi(a|s) of the taken actions."""
        actions = tokens.actions[tokens.action_mask]
        return taken_logprobs(states, actions, lambda hidden: self._acting_logits(hidden, role))

    # --- what learning asks ---------------------------------------------------------------------------------------

    def forward(self, batch: PrefixBatch) -> QOutput:
        """Online Q of the actions in the batch, with gradient. `next_values` are left at zero: targets supply them."""
        tokens = batch.tokens
        hidden = self._hidden(tokens, "online")
        states = action_states(hidden, tokens)
        zeros = torch.zeros(tokens.actions.shape, device=hidden.device)
        values = zeros
        if "value" in self.heads:
            # V reads the trunk but does not shape it: its gradient there is 1 / beta times the policy's.
            values = spread(self._value_head("online")(states.detach()), tokens.action_mask)
        logprobs = zeros
        if self.needs_logprobs:
            logprobs = spread(self._taken_logprobs(states, tokens, "online"), tokens.action_mask)
        if self.kind == "lm":
            taken = values + self.beta * (logprobs - batch.ref_logprobs)
        else:
            taken = spread(self._q_head("online").taken(states, tokens.actions[tokens.action_mask]), tokens.action_mask)
        return QOutput(taken, values, zeros, logprobs)

    def conservative_term(self, batch: PrefixBatch) -> Tensor:
        """(B, T) log sum_a exp Q(s, a) of the online linear head, with gradient, for CQL."""
        states = action_states(self._hidden(batch.tokens, "online"), batch.tokens)
        return spread(logsumexp_q(states, self._q_head("online")), batch.action_mask)

    @torch.no_grad()
    def target(self, batch: PrefixBatch, role: Role = "target") -> QOutput:
        """Q(s, a), V(s) and V(s') of the target network: everything that a TD target is made of, without gradient."""
        tokens = batch.tokens
        hidden = self._hidden(tokens, role)
        states = action_states(hidden, tokens)
        values, next_values = self._state_values(hidden, tokens, role)
        if self.kind == "lm":
            logprobs = spread(self._taken_logprobs(states, tokens, role), tokens.action_mask)
            base = self._spread_values(hidden, tokens, role)[0] if self.backup else values
            taken = base + self.beta * (logprobs - batch.ref_logprobs)
        else:
            logprobs = torch.zeros_like(values)
            q_head = self._q_head(role)
            taken = spread(q_head.taken(states, tokens.actions[tokens.action_mask]), tokens.action_mask)
        return QOutput(taken * tokens.action_mask, values, next_values, logprobs)

    def _spread_values(self, hidden: Tensor, tokens: TokenBatch, role: Role) -> tuple[Tensor, Tensor]:
        """V(s) and V(s') from the value head, (B, T) each."""
        flat = self._value_head(role)(visited_states(hidden, tokens))
        return split_values(flat, tokens)

    def _state_values(self, hidden: Tensor, tokens: TokenBatch, role: Role) -> tuple[Tensor, Tensor]:
        if self.backup is None:
            return self._spread_values(hidden, tokens, role)
        backup = self.backup
        online = visited_states(self._hidden(tokens, "online"), tokens)
        reference = visited_states(self._hidden(tokens, "reference"), tokens) if self.kind == "lm" else online

        def reduce(states: Tensor, online_states: Tensor, ref_states: Tensor) -> Tensor:
            log_prior = self._log_prior(states, ref_states, role)
            q_values = self._q_values(states, log_prior, role)
            return backup(q_values, log_prior, self._q_values(online_states, log_prior, "online"))

        return split_values(reduce_states(reduce, visited_states(hidden, tokens), online, reference), tokens)

    def _log_prior(self, states: Tensor, ref_states: Tensor, role: Role) -> Tensor:
        """(N, V) log prior(a|s): the reference for `lm`; the LM on the same trunk, or uniform, for `linear`."""
        if self.uniform_prior:
            return torch.zeros(len(states), self.num_tokens, device=states.device).log_softmax(-1)
        if self.kind == "lm":
            return self._lm_logits(ref_states, "reference").log_softmax(-1)
        return self._lm_logits(states, role).log_softmax(-1)

    def _q_values(self, states: Tensor, log_prior: Tensor, role: Role) -> Tensor:
        """(N, V) all Q-values of a chunk of states."""
        if self.kind == "linear":
            return self._q_head(role)(states)
        advantages = self.beta * (self._lm_logits(states, role).log_softmax(-1) - log_prior)
        return self._value_head(role)(states).unsqueeze(-1) + advantages

    # --- what acting and watching ask -----------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, tokens: TokenBatch, top: int = 3) -> TokenLook:
        """Q, V and ranks of every completion token, row after row, and the base model's `top` likeliest instead.

        V is the value head's, or else (`linear`) the soft maximum beta log sum_a prior(a|s) exp(Q(s, a) / beta), so
        that Q - V = beta (log pi - log prior) for both heads.
        """
        actions, size = tokens.actions[tokens.action_mask], chunk_for(self.device, self.num_tokens)
        # No action is chosen after the last token, so the trunk need not read it.
        read = replace(tokens, input_ids=tokens.input_ids[:, :-1], attention_mask=tokens.attention_mask[:, :-1])
        ref_states = action_states(self._hidden(read, "reference"), tokens)
        # Entering a role costs more than a chunk, so all chunks of the reference come before those of the policy.
        with self.roles.acting_as("reference") as plain, self._precision():
            head = models.lm_head(plain)
            chosen, ref_logprobs, base_ranks = map_states(
                lambda states, actions: base_choices(self._chosen_rows(head(states)), actions, top),
                size,
                ref_states,
                actions,
            )
        states = ref_states if self.is_base else action_states(self._hidden(read, "online"), tokens)

        def piece(states: Tensor, chosen: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, ...]:
            logits = self._acting_logits(states, "online")
            logprobs, ranks = logprobs_and_rank(logits, chosen)
            if self.kind == "lm":
                values = self._value_head("online")(states)
                return values.unsqueeze(-1) + self.beta * (logprobs - ref_logprobs), values, logprobs.exp(), ranks
            q_values = self._q_head("online")(states)
            prior = torch.zeros_like(logits) if self.uniform_prior else logits - q_values / self.beta
            soft = "value" not in self.heads
            log_prior = prior.log_softmax(-1)
            values = soft_value(q_values, log_prior, self.beta) if soft else self._value_head("online")(states)
            return q_values.gather(-1, chosen), values, logprobs.exp(), ranks

        if self.is_base:
            values = self._value_head("online")(states)
            q_values, probs, ranks = values.unsqueeze(-1).expand_as(chosen), ref_logprobs.exp(), base_ranks
        else:
            q_values, values, probs, ranks = map_states(piece, size, states, chosen, ref_logprobs)
        top_base_probs = ref_logprobs[:, 1:].exp()
        return TokenLook(
            q_values[:, 0], values, ranks, base_ranks, chosen[:, 1:], q_values[:, 1:], top_base_probs, probs[:, 1:]
        )

    @torch.no_grad()
    def logprobs(self, tokens: TokenBatch, role: Role) -> Tensor:
        """(B, T) log pi(a|s) of the completion tokens under the policy of `role`; 0 where masked."""
        states = action_states(self._hidden(tokens, role), tokens)
        return spread(self._taken_logprobs(states, tokens, role), tokens.action_mask)

    @torch.no_grad()
    def kl(self, tokens: TokenBatch, scale: float = 1.0) -> Tensor:
        """(B, T) exact KL(pi || pi_ref) over the vocabulary, in nats, at every visited state; 0 where masked.

        scale: of the policy pi_ref (pi / pi_ref)^scale instead of pi.
        """
        online = action_states(self._hidden(tokens, "online"), tokens)
        reference = action_states(self._hidden(tokens, "reference"), tokens)

        def divergence(online_states: Tensor, ref_states: Tensor) -> Tensor:
            log_pi = self._acting_logits(online_states, "online").log_softmax(-1)
            log_ref = self._lm_logits(ref_states, "reference").log_softmax(-1)
            if scale != 1:
                log_pi = (log_ref + scale * (log_pi - log_ref)).log_softmax(-1)
            return (log_pi.exp() * (log_pi - log_ref)).sum(-1)

        return spread(reduce_states(divergence, online, reference), tokens.action_mask)

    @contextmanager
    def writer(self, role: Role) -> Iterator[PreTrainedModel]:
        """The Hugging Face model that writes completions as the policy of `role`, in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.roles.acting_as(role) as plain, self._precision():
                if self.kind == "lm" or self._folded:
                    yield plain
                    return
                before = models.lm_head(plain)  # an acting head while the reference is asked within another's writing
                head: nn.Module = before.lm_head if isinstance(before, ActingHead) else before
                if role != "reference":
                    head = ActingHead(head, self._q_head(role), self.beta, self.uniform_prior)
                plain.set_output_embeddings(head)
                try:
                    yield plain
                finally:
                    plain.set_output_embeddings(before)
        finally:
            self.model.train(was_training)

    # --- target, saving -------------------------------------------------------------------------------------------

    def start_values_at(self, reward: float) -> None:
        """Before the first update every state is worth the mean reward seen so far."""
        for head in (*self.heads.values(), *self.target_heads.values()):
            assert isinstance(head, ValueHead | LinearQHead)
            head.start_at(reward)

    @torch.no_grad()
    def sync_target(self, tau: float = 1.0) -> None:
        """Target <- tau * online + (1 - tau) * target, heads and (with target: adapter) trunk."""
        self.roles.sync_target(tau)
        for old, new in zip(self.target_heads.parameters(), self.heads.parameters(), strict=True):
            old.lerp_(new, tau) if tau < 1 else old.copy_(new)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Everything that training changes, without the base: adapters and heads of both networks."""
        heads = {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        targets = {f"target_heads.{k}": v for k, v in self.target_heads.state_dict().items()}
        return {**self.roles.state(), **heads, **targets}

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `checkpoint_state`."""
        self.roles.load_state(state)
        for prefix, heads in (("heads.", self.heads), ("target_heads.", self.target_heads)):
            heads.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def save_policy(self, folder: Path) -> None:
        """Writes the tuned LM as others open it, and the heads beside it for scoring.

        A linear head is folded into the output layer: W_lm h + (W_q h) / beta = (W_lm + W_q / beta) h, its common bias
        being the same for all tokens.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "lm":
            self.roles.save(folder)
        else:
            self.roles.save_with_head(folder, self.head_name, self._folded_head())
        heads = {name: value.detach().cpu().contiguous() for name, value in self.heads.state_dict().items()}
        facts = {"q_head": self.kind, "beta": self.beta, "num_tokens": self.num_tokens, "uniform": self.uniform_prior}
        save_file(heads, folder / "q_head.safetensors", metadata={"llm_dqn": json.dumps(facts)})

    @torch.no_grad()
    def _folded_head(self) -> Tensor:
        with self.roles.acting_as("online") as plain:
            weight = models.lm_head(plain).weight.detach().float().clone()
        scaled_q = self._q_head("online").weight / self.beta
        weight[: self.num_tokens] = scaled_q if self.uniform_prior else weight[: self.num_tokens] + scaled_q
        return weight

    def load_heads(self, folder: Path) -> None:
        """Reads the heads that `save_policy` wrote; `heads.saved_heads` says with what a network must be built."""
        self.heads.load_state_dict(load_file(folder / "q_head.safetensors"))
        self.target_heads.load_state_dict(self.heads.state_dict())


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _is_identity(postprocess: Callable[[Tensor], Tensor], head: nn.Module) -> bool:
    probe = torch.linspace(-40, 40, 7)
    return getattr(head, "bias", None) is None and torch.equal(postprocess(probe), probe)
