"""One base model, three roles: `online` (tuned), `target` (lagging), `reference` (the untouched model).

With LoRA the roles share the base: `online` and `target` are two adapters, `reference` is the adapter switched off, so
a target network costs megabytes. Without LoRA they are copies. This is the only file that knows PEFT.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_dqn import models

Role = Literal["online", "target", "reference"]

_ADAPTER_OF: dict[str, str] = {"online": "default", "target": "target"}


class Roles(Protocol):
    """What the Q-network needs of the models behind it."""

    model: nn.Module  # everything trainable, as one module

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether the transformer under the output layer is the same in every role, for good."""

    def acting_as(self, role: Role) -> Any:
        """Context that yields the plain Hugging Face model of `role`."""

    def plain(self, role: Role) -> PreTrainedModel:
        """The same model without switching to the role: for those of its layers that no adapter sits on."""

    def sync_target(self, tau: float) -> None:
        """Target <- tau * online + (1 - tau) * target."""

    def state(self) -> dict[str, Tensor]:
        """Weights of online and target that differ from the base, for checkpoints."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state`."""

    def save(self, folder: Path) -> None:
        """Writes the online model for others to open."""

    def save_with_head(self, folder: Path, head_name: str, weight: Tensor) -> None:
        """`save` with another output layer (rows, H)."""


def lora_config(r: int, lora_alpha: int, lora_dropout: float, target_modules: str | list[str]) -> LoraConfig:
    """A causal-LM `LoraConfig` from plain values."""
    return LoraConfig(
        r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )


def targets_head(config: LoraConfig | str | None, head_name: str) -> bool:
    """Whether a new adapter would also sit on the output layer, which a tied model must untie for first."""
    modules = config.target_modules if isinstance(config, LoraConfig) else None
    if isinstance(modules, str):  # "all-linear" leaves the output layer out; anything else is an expression to PEFT
        return modules.lower() != "all-linear" and re.fullmatch(modules, head_name) is not None
    return modules is not None and any(head_name == name or head_name.endswith("." + name) for name in modules)


def targets_nothing(config: LoraConfig | str | None) -> bool:
    """Whether an empty list of modules says that nothing of the model is to be tuned."""
    modules = config.target_modules if isinstance(config, LoraConfig) else None
    return modules is not None and len(modules) == 0


def disable_dropout(model: nn.Module) -> None:
    """A base model that drops units is a different policy at every pass; only LoRA's own dropout may act."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def lora_facts(config: LoraConfig) -> dict[str, Any]:
    """The reverse of `lora_config`."""
    modules = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": modules if isinstance(modules, str) else sorted(modules or []),
    }


class NotByRow(RuntimeError):
    """A layer got something else than a batch of rows, such as a flat list of tokens."""


class AdapterRoles:
    """LoRA: two adapters on one base, the reference being neither.

    config: a fresh adapter's settings, or the folder or Hub id of a saved one, which then writes and is not trained.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig | str, target: Literal["adapter", "head"]) -> None:
        disable_dropout(model)
        if isinstance(config, str):
            self.model: PeftModel = PeftModel.from_pretrained(model, config)
            self.has_target = False
            return
        config.task_type = config.task_type or "CAUSAL_LM"
        # a base from the Hub is opened again at the commit that was tuned, however its branch moves on
        config.revision = config.revision or getattr(model.config, "_commit_hash", None)
        self.model = get_peft_model(model, config)
        self.has_target = target == "adapter"
        if self.has_target:
            self.model.add_adapter("target", copy.deepcopy(config))
            self.sync_target(1.0)
        self._activate("default")

    def _activate(self, adapter: str) -> None:
        # PEFT makes the active adapter trainable; the target must never be.
        self.model.base_model.set_adapter(adapter, inference_mode=adapter != "default")

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[PreTrainedModel]:
        """Yields the plain model with the adapter of `role` switched on, or none for the reference."""
        plain = self.model.get_base_model()
        if role == "reference":
            with self.model.disable_adapter():
                yield plain
        elif role == "target" and self.has_target:
            self._activate("target")
            try:
                yield plain
            finally:
                self._activate("default")
        else:
            yield plain

    def low_rank(self, layer: nn.Module, role: Role) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """An adapted linear layer's term beside its base, as (x (..., in) -> (..., r), weight (out, r)).

        None where no plain LoRA of that role sits on it.
        """
        name = _ADAPTER_OF["target" if role == "target" and self.has_target else "online"]
        if (
            not isinstance(layer, LoraLinear)
            or name not in layer.lora_A
            or type(layer.get_base_layer()) is not nn.Linear
        ):
            return None
        if layer.lora_variant.get(name) or layer.lora_bias.get(name) or layer.merged:
            return None
        down, drop, scale = layer.lora_A[name], layer.lora_dropout[name], layer.scaling[name]
        return lambda x: down(drop(x.to(down.weight.dtype))) * scale, layer.lora_B[name].weight

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether adapters sit on the output layer alone, and nothing else is trained either."""
        trunk = models.trunk(self.plain("online"))
        adapted = any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in trunk.modules())
        return not adapted and not any(parameter.requires_grad for parameter in trunk.parameters())

    @property
    def mixes_rows(self) -> bool:
        """Whether rows of one batch may be of different roles: with plain LoRA on linear layers only."""
        config = self.model.peft_config["default"]
        special = config.use_dora or config.modules_to_save or config.trainable_token_indices
        return not special and all(isinstance(layer, LoraLinear) for layer in self._lora_layers())

    def _lora_layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    @contextmanager
    def mixed(self, rows: Sequence[Role]) -> Iterator[None]:
        """Within it, row i of a batch is of the role rows[i], online or reference: for the reference its part of what
        the adapter adds is zero. Only to write, not to learn.

        The model raises NotByRow where it takes a batch apart otherwise than by rows.
        """
        ours = torch.tensor([role == "online" for role in rows], device=next(self.model.parameters()).device)

        def silence(_: nn.Module, __: Any, added: Tensor) -> Tensor:
            if added.dim() != 3 or len(added) != len(rows):
                raise NotByRow
            return added * ours[:, None, None].to(added)

        hooks = [layer.lora_B["default"].register_forward_hook(silence) for layer in self._lora_layers()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def plain(self, role: Role) -> PreTrainedModel:
        """The base, whatever the role."""
        return self.model.get_base_model()

    def _adapter(self, role: str) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.model, adapter_name=_ADAPTER_OF[role], save_embedding_layers=False)

    @torch.no_grad()
    def sync_target(self, tau: float) -> None:
        """Target <- tau * online + (1 - tau) * target, factor by factor; exact only for tau = 1."""
        if not self.has_target:
            return
        online = dict(self.model.named_parameters())
        for name, parameter in online.items():
            if ".target." in name or name.endswith(".target"):
                twin = online[name.replace(".target", ".default")]
                parameter.lerp_(twin.to(parameter.dtype), tau) if tau < 1 else parameter.copy_(twin)

    def state(self) -> dict[str, Tensor]:
        """Both adapters, keys prefixed by their role."""
        roles = ["online", "target"] if self.has_target else ["online"]
        return {f"{role}.{name}": value for role in roles for name, value in self._adapter(role).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts both adapters back."""
        for role, adapter in _ADAPTER_OF.items():
            part = {k.removeprefix(role + "."): v for k, v in state.items() if k.startswith(role + ".")}
            if part:
                set_peft_model_state_dict(self.model, part, adapter_name=adapter)

    def save(self, folder: Path) -> None:
        """An ordinary PEFT adapter; the target stays out of it, and so does the base's output layer."""
        self.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)

    def save_with_head(self, folder: Path, head_name: str, weight: Tensor) -> None:
        """`save` with another output layer (rows, H), stored as a fully saved module, which plain PEFT understands."""
        self.save(folder)
        weights_file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        weights = load_file(weights_file)
        weights[f"base_model.model.{head_name}.weight"] = weight.contiguous()
        save_file(weights, weights_file, metadata={"format": "pt"})
        config = json.loads(config_file.read_text())
        config["modules_to_save"] = sorted({*(config.get("modules_to_save") or []), head_name})
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class CopyRoles:
    """Full fine-tuning: the reference, and the target when asked for, are copies of the model.

    tuned: weights that were trained before; `model` is then the reference only. frozen: one model plays every role,
    and none of its weights is tuned, only a head beside it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target: Literal["adapter", "head"],
        tuned: PreTrainedModel | None = None,
        frozen: bool = False,
    ) -> None:
        disable_dropout(model)
        self.trunk_is_frozen = frozen
        self.model: PreTrainedModel = model if tuned is None else tuned
        if frozen:
            self._reference, self._target = model.requires_grad_(False).eval(), None
            return
        self._reference = (copy.deepcopy(model) if tuned is None else model).requires_grad_(False).eval()
        self._target = copy.deepcopy(self.model).requires_grad_(False).eval() if target == "adapter" else None
        self.model.requires_grad_(True)

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[PreTrainedModel]:
        """Yields the copy that plays `role`."""
        yield self.plain(role)

    def plain(self, role: Role) -> PreTrainedModel:
        """The copy that plays `role`."""
        if role == "reference":
            return self._reference
        return self._target if role == "target" and self._target is not None else self.model

    @torch.no_grad()
    def sync_target(self, tau: float) -> None:
        """Target <- tau * online + (1 - tau) * target."""
        if self._target is not None:
            for old, new in zip(self._target.parameters(), self.model.parameters(), strict=True):
                old.lerp_(new, tau) if tau < 1 else old.copy_(new)

    def _weights(self) -> dict[str, nn.Parameter]:
        """What training changes, keys prefixed by their role; tied weights once, frozen ones never."""
        parts = {} if self.trunk_is_frozen else {"online": self.model, "target": self._target}
        return {
            f"{role}.{name}": parameter
            for role, model in parts.items()
            if model is not None
            for name, parameter in model.named_parameters()
        }

    def state(self) -> dict[str, Tensor]:
        """Online and target weights, see `_weights`."""
        return {name: parameter.detach() for name, parameter in self._weights().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts the weights back."""
        for name, parameter in self._weights().items():
            parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """A plain Hugging Face model."""
        self.model.save_pretrained(str(folder))

    @torch.no_grad()
    def save_with_head(self, folder: Path, head_name: str, weight: Tensor) -> None:
        """`save` with another output layer (rows, H); the one in memory stays as it is."""
        layer = self.model.get_submodule(head_name).weight
        kept = layer.clone()
        layer.copy_(weight)
        try:
            self.save(folder)
        finally:
            layer.copy_(kept)
