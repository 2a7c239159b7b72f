"""The Q-network: a pretrained causal LM that says what the next token is worth.

`lm`      Q(s, a) = V(s) + beta [log pi(a|s) - log pi_ref(a|s)]. The LM's own output layer carries the advantage, a
          small head on the hidden state carries V. Because pi is normalised, beta log sum_a pi_ref exp(Q / beta) = V
          exactly: a soft maximum that costs nothing. Acting by pi_ref exp(Q / beta) is sampling from the LM.
`linear`  Q(s, a) = w_a . h(s) + b, the textbook head, acting by prior * exp(Q / beta), the prior being the LM's own
          output layer on the same hidden state.

B episodes, L padded length, T actions, N action positions, H hidden size, V tokens that may be chosen.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_dqn import models, vocabulary
from llm_dqn.adapters import LoraConfig, Role
from llm_dqn.heads import LM_HEAD, HeadSettings, base_choices, logprobs_and_rank, map_states, reduce_states
from llm_dqn.policy_network import PolicyNetwork
from llm_dqn.states import action_states, split_values, spread, visited_states
from llm_dqn.targets import soft_value
from llm_dqn.types import PrefixBatch, QOutput, TokenBatch, TokenLook

# (q_values (N, V), log_prior (N, V), what gives the online q_values (N, V)) -> values (N,): a rule of `targets`
Backup = Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]


class QNetwork(PolicyNetwork):
    """Online network, target network and reference policy on one base model.

    backup: how Q-values make a state's value; None takes V from the value head, which for `lm` is the soft value, and
    "soft" is the soft maximum of a linear head. Everything else as `PolicyNetwork` has it.
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
        backup: Backup | Literal["soft"] | None = None,
    ) -> None:
        super().__init__(model, num_tokens, head, lora=lora, tuned=tuned, target=target, bf16=bf16)
        self.backup = backup

    # --- what learning asks ---------------------------------------------------------------------------------------

    def forward(self, batch: PrefixBatch, raised: Tensor | None = None, normalizers: bool = False) -> QOutput:
        """Online Q of the actions in the batch, with gradient. `next_values` are left at zero: targets supply them.

        raised: (B, T) where a linear head is asked for log pi(a|s) as well; None: everywhere. normalizers: of a linear
        head, log sum_a exp Q(s, a) too, for CQL.
        """
        tokens, mask = batch.tokens, batch.action_mask
        hidden = self._hidden(tokens, "online")
        states, actions = action_states(hidden, tokens), tokens.actions[mask]
        zeros = torch.zeros(tokens.actions.shape, device=hidden.device)
        values = zeros
        if "value" in self.heads:
            # V reads the trunk but does not shape it: its gradient there is 1 / beta times the policy's.
            values = spread(self._value_head("online")(states.detach()), mask)
        if self.kind == "lm":
            logprobs = spread(self._taken_logprobs(states, tokens, "online"), mask)
            return QOutput(values + self.beta * (logprobs - batch.ref_logprobs), values, zeros, logprobs)
        wanted = mask if raised is None else raised & mask
        taken, logprobs = self._linear_taken(states, actions, wanted[mask].nonzero().squeeze(1), "online")
        q = QOutput(spread(taken, mask), values, zeros, spread(logprobs, wanted))
        return replace(q, normalizers=spread(self._q_normalizers(states, actions), mask)) if normalizers else q

    def _q_normalizers(self, states: Tensor, actions: Tensor) -> Tensor:
        """(N,) log sum_a exp Q(s, a) of the online linear head."""
        q_head, everywhere = self._q_head("online"), torch.arange(len(states), device=states.device)
        return vocabulary.linear_taken(states, q_head.weight, actions, everywhere, None, scale=1)[1] + q_head.bias

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
        states = visited_states(hidden, tokens)
        if self.backup == "soft":
            return split_values(self._soft_values(states, role), tokens)
        backup = self.backup
        reference = visited_states(self._hidden(tokens, "reference"), tokens) if self.kind == "lm" else states

        @cache
        def online_states() -> Tensor:
            return visited_states(self._hidden(tokens, "online"), tokens)

        def reduce(states: Tensor, ref_states: Tensor, places: Tensor) -> Tensor:
            log_prior = self._log_prior(states, ref_states, role)
            q_values = self._q_values(states, log_prior, role)
            return backup(q_values, log_prior, lambda: self._q_values(online_states()[places], log_prior, "online"))

        places = torch.arange(len(states), device=states.device)
        return split_values(reduce_states(reduce, self._chunk, states, reference, places), tokens)

    def _soft_values(self, states: Tensor, role: Role) -> Tensor:
        """(N,) beta log sum_a prior(a|s) exp(Q(s, a) / beta) of a linear head: `targets.soft_value`."""
        q_head, rows = self._q_head(role), self._output_rows(role)
        if self.uniform_prior:
            soft = vocabulary.log_normalizer(states, None, q_head.weight, 1 / self.beta)
            return self.beta * (soft - math.log(self.num_tokens)) + q_head.bias
        if rows is None:

            def reduce(states: Tensor) -> Tensor:
                log_prior = self._log_prior(states, states, role)
                return soft_value(self._q_values(states, log_prior, role), log_prior, self.beta)

            return reduce_states(reduce, self._chunk, states)
        return self.beta * vocabulary.log_mean_exp(states, rows, q_head.weight, 1 / self.beta) + q_head.bias

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

    # --- what watching asks ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, tokens: TokenBatch, top: int = 3) -> TokenLook:
        """Q, V and ranks of every completion token, row after row, and the base model's `top` likeliest instead.

        V is the value head's, or else (`linear`) the soft maximum beta log sum_a prior(a|s) exp(Q(s, a) / beta), so
        that Q - V = beta (log pi - log prior) for both heads.
        """
        actions, size = tokens.actions[tokens.action_mask], self._chunk
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
