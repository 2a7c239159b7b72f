"""Who acts: one base model in three roles, the heads on it, and the log-probabilities of what it writes.

B episodes, L padded length, T actions, N action positions, H hidden size, V tokens that may be chosen.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_dqn import models, vocabulary
from llm_dqn.adapters import AdapterRoles, CopyRoles, LoraConfig, Role, targets_head, targets_nothing
from llm_dqn.errors import UserError
from llm_dqn.heads import (
    LM_HEAD,
    ActingHead,
    HeadSettings,
    LinearQHead,
    ValueHead,
    chunk_for,
    reduce_states,
    taken_logprobs,
)
from llm_dqn.hidden_cache import HiddenCache
from llm_dqn.numerics import denormals_are_zero
from llm_dqn.states import action_states, completion_means, spread
from llm_dqn.types import TokenBatch
from llm_dqn.vocabulary import OutputRows

DEPTHS = 5  # layers whose states describe a completion, embeddings and output among them


class PolicyNetwork(nn.Module):
    """Online network, target network and reference policy on one base model, as far as they act.

    num_tokens: rows of the output layer that may be chosen; padded rows beyond them get no probability and no value.
    head: which heads there are and how they act; by default the LM's own output layer and V.
    lora: a new adapter's settings, or the path of a saved one that only writes. None tunes all weights, and keeps
    copies of the model as reference and target; `tuned` are weights from such a run (`model` itself: none).
    bf16: the trunk runs in bfloat16 autocast; Q, targets and losses stay float32.
    target: "adapter" lags adapter and heads; "head" lags the heads only, on a trunk that moves under them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_tokens: int,
        head: HeadSettings = LM_HEAD,
        *,
        lora: LoraConfig | str | None = None,
        tuned: PreTrainedModel | None = None,
        target: Literal["adapter", "head"] = "adapter",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        models.verify_head_shortcut(model)
        self.head_name = _name_of(model, models.lm_head(model))
        self.base_name = str(model.name_or_path)
        self.num_tokens, self.kind, self.beta = num_tokens, head.q_head, head.beta
        self.uniform_prior, self.bf16 = head.uniform_prior, bf16
        self.is_base = tuned is model  # nothing is tuned: one pass answers for both policies
        # as `save_policy` leaves it
        self._folded = head.q_head == "linear" and (isinstance(lora, str) or tuned is not None)
        self._postprocess = models.head_postprocess(model)
        self._bend = None if _is_identity(self._postprocess) else self._postprocess
        if head.q_head == "linear" and (self._bend is not None or models.lm_head(model).bias is not None):
            raise UserError(
                f"dqn.q_head: linear adds Q / beta to the logits, and {type(model).__name__} changes its logits "
                "afterwards (softcap, scale or bias); use q_head: lm"
            )
        head_adapted, frozen = targets_head(lora, self.head_name), targets_nothing(lora)
        if head.q_head == "linear" and head_adapted:
            raise UserError(
                f"lora.target_modules: dqn.q_head: linear is saved in place of '{self.head_name}', so that an adapter "
                "there would be lost; take it out of the list ([] tunes the linear head alone), or use q_head: lm"
            )
        if head.q_head == "lm" and frozen:
            raise UserError(
                "lora.target_modules: [] tunes nothing of the language model, and dqn.q_head: lm has no other head to "
                f"act by; use q_head: linear, or name modules, such as [{self.head_name}]"
            )
        if head.q_head == "linear" or head_adapted:
            models.untie_head(model)
        self.heads = head.build(models.lm_head(model).in_features, num_tokens)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.roles = (
            CopyRoles(model, target, tuned, frozen) if lora is None or frozen else AdapterRoles(model, lora, target)
        )
        self.model = self.roles.model
        self.hidden_cache: HiddenCache | None = None
        self.to(next(model.parameters()).device)

    @property
    def reward_scale(self) -> float:
        """The unit in which V, beta and the TD error are measured."""
        return self._value_head("online").scale if self.kind == "lm" else 1.0

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
        if self.hidden_cache is not None:
            return self.hidden_cache.hidden(tokens, self._frozen_states)
        with self.roles.acting_as(role) as plain, self._precision():
            trunk = models.trunk(plain)
            return trunk(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
            ).last_hidden_state

    @torch.no_grad()
    def completion_states(self, tokens: TokenBatch) -> Tensor:
        """(B, D) what the reference makes of whole completions: at a few depths the mean over their tokens' hidden
        states, and the last state of all.
        """
        self.model.eval()
        with self.roles.acting_as("reference") as plain, self._precision():
            trunk = models.trunk(plain)
            given = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
            states = trunk(**given, use_cache=False, output_hidden_states=True).hidden_states
        depths = sorted({round(place * (len(states) - 1) / (DEPTHS - 1)) for place in range(DEPTHS)})
        return completion_means([states[depth] for depth in depths], tokens)

    @denormals_are_zero()  # wherever it is asked for
    @torch.no_grad()
    def _frozen_states(self, ids: Tensor) -> Tensor:
        """(B, n) unpadded ids -> (B, n, H) of a trunk that is the same in every role."""
        trunk = models.trunk(self.roles.plain("reference")).eval()
        with self._precision():
            return trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state

    def keep_hidden_states(self, limit: int) -> bool:
        """Keeps episodes' hidden states from now on, in `limit` bytes; False, and nothing changes, on a tuned trunk."""
        if self.roles.trunk_is_frozen:
            self.hidden_cache = HiddenCache(limit)
        return self.hidden_cache is not None

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

    @property
    def _chunk(self) -> int:
        return chunk_for(self.device, self.num_tokens)

    def _output_rows(self, role: Role) -> OutputRows | None:
        """The LM's output layer in that role, without what an adapter adds; None where it is trained itself.

        All roles take one path, with or without gradient: where no reward is, their rounding errors must cancel.
        """
        head: nn.Module = models.lm_head(self.roles.plain(role))
        if not (self.has_adapter or self.roles.trunk_is_frozen):
            return None
        if self._low_rank("online") is not None:
            head = head.get_submodule("base_layer")
        if type(head) is not nn.Linear:
            return None
        return OutputRows(
            weight=head.weight[: self.num_tokens],
            bias=None if head.bias is None else head.bias[: self.num_tokens],
            postprocess=self._bend,
            dtype=torch.bfloat16 if self.bf16 else head.weight.dtype,
        )

    def _low_rank(self, role: Role) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """What an adapter on the output layer adds in that role: (hidden -> (N, r), (rows, r)); None without one."""
        if not isinstance(self.roles, AdapterRoles) or role == "reference":
            return None
        return self.roles.low_rank(models.lm_head(self.roles.plain(role)), role)

    def _taken_logprobs(self, states: Tensor, tokens: TokenBatch, role: Role) -> Tensor:
        """(N,) log pi(a|s) of the taken actions."""
        actions, rows = tokens.actions[tokens.action_mask], self._output_rows(role)
        if rows is None:
            return taken_logprobs(states, actions, lambda hidden: self._acting_logits(hidden, role), self._chunk)
        added = self._low_rank(role)
        if added is not None:
            down, up = added
            with self._precision():
                low = down(states).float()
            return vocabulary.adapted_logprobs(states, low, actions, rows, up[: self.num_tokens].float())
        if self.kind == "lm" or role == "reference" or self._folded:
            return vocabulary.taken_logprobs(states, actions, rows)
        return self._linear_taken(states, actions, torch.arange(len(actions), device=actions.device), role)[1]

    def _linear_taken(self, states: Tensor, actions: Tensor, chosen: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """Q of the taken actions by the linear head, (N,), and log pi(a|s) of those at the positions `chosen`, (M,)."""
        q_head, rows = self._q_head(role), self._output_rows(role)
        if rows is None and not self.uniform_prior:
            logits_of = partial(self._acting_logits, role=role)
            return q_head.taken(states, actions), taken_logprobs(
                states[chosen], actions[chosen], logits_of, self._chunk
            )
        prior = None if self.uniform_prior else rows
        products, normalizers = vocabulary.linear_taken(
            states, q_head.weight, actions, chosen, prior, scale=1 / self.beta
        )
        logits = products[chosen] / self.beta
        if prior is not None:
            logits = logits + torch.linalg.vecdot(states[chosen].float(), prior.weight[actions[chosen]].float())
        return products + q_head.bias, logits - normalizers

    # --- acting ---------------------------------------------------------------------------------------------------

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

        return spread(reduce_states(divergence, self._chunk, online, reference), tokens.action_mask)

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

    def measure_in(self, scale: float) -> None:
        """Learns in this unit of reward from now on: what V moves in a step, and the price `beta` of leaving the base.

        Of the lm head; a linear one learns from rewards as they are.
        """
        self.beta *= scale / self.reward_scale
        for role in ("online", "target"):
            self._value_head(role).measure_in(scale)

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
        told = copy.deepcopy(self.heads)
        for head in told.values():
            if isinstance(head, ValueHead):
                head.measure_in(1.0)  # whoever scores by it need not know the unit
        heads = {name: value.detach().cpu().contiguous() for name, value in told.state_dict().items()}
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


def _is_identity(postprocess: Callable[[Tensor], Tensor]) -> bool:
    probe = torch.linspace(-40, 40, 7)
    return torch.equal(postprocess(probe), probe)
