"""A trunk behind an input embedding layer of ours: what all such models share, whatever the layer is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import CompileConfig
from transformers.masking_utils import create_masks_for_generate

from scone.models.captured_calls import CapturedCalls, lies_on_one_device, options_within_a_graph
from scone.models.configuration import EmbeddedTrunkConfig
from scone.models.remote_code import write_remote_code
from scone.models.step_look_up import OrdinaryLookUp, StepLookUp
from scone.models.token_history import StaticTokenHistory, TokenHistory, extend_history, hidden, known_past
from scone.utils.files import give_umask_mode


class EmbeddedTrunk(PreTrainedModel, GenerationMixin):
    """``trunk``, an ordinary causal language model, whose input vectors come from ``embed``.

    A subclass gives ``embed``, the number of tokens before a position that it depends on, and its layer.
    """

    config_class = EmbeddedTrunkConfig
    base_model_prefix = "trunk"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the host looks n-grams up between the steps

    def __init__(self, config: EmbeddedTrunkConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.trunk = AutoModelForCausalLM.from_config(config.text_config) if trunk is None else trunk
        self._no_split_modules = list(self.trunk._no_split_modules or [])
        self._embedding_place: tuple[str, ...] = ()
        self._captured: CapturedCalls | None = None

    @abstractmethod
    def embed(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        trie: dict[str, Any] | None = None,
    ) -> Tensor:
        """Input vectors ``[B, T, D]`` of tokens that follow what ``cache`` holds; ``trie`` is what the data loader has
        looked up already.
        """

    def input_vectors(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        trie: dict[str, Any] | None = None,
    ) -> Tensor:
        """What the trunk gets, ``[B, T, D]``: as `embed`, which see, times ``embedding_scale``."""
        return self.scaled(self.embed(input_ids, mask, cache, trie))

    def scaled(self, vectors: Tensor) -> Tensor:
        """Of `embed`, as the trunk gets them."""
        return vectors if self.config.embedding_scale == 1.0 else vectors * self.config.embedding_scale

    def step_look_up(self, inputs: Mapping[str, Any]) -> StepLookUp | None:
        """What comes before a captured step with these arguments; None where it can be captured whole."""
        return OrdinaryLookUp(self, inputs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As Hugging Face's, plus the file by which ``trust_remote_code`` finds us."""
        # sharding puts a class of its own in front of ours
        model_class = next(ours for ours in type(self).__mro__ if ours.__module__.startswith("scone."))
        names: dict[str, type] = {"AutoConfig": type(self.config), "AutoModelForCausalLM": model_class}
        self.config.auto_map = {auto: f"modeling_scone.{ours.__name__}" for auto, ours in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_remote_code(Path(save_directory), *names.values())
            give_umask_mode(Path(save_directory), "*.safetensors")

    # ------------------------------------------------------------------ Hugging Face's questions

    def get_input_embeddings(self) -> nn.Module:
        """T of the trunk. Searching takes as long as embedding a token, so where it was found is looked at first."""
        module: nn.Module | None = self._modules["trunk"]
        for name in self._embedding_place:
            module = None if module is None else module._modules.get(name)
        if module is None or not self._embedding_place:
            module = self.trunk.get_input_embeddings()
            places = (name.split(".") for name, part in self.trunk.named_modules() if part is module)
            self._embedding_place = tuple(next(places, ()))
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.set_input_embeddings(value)

    def _token_weight(self) -> Tensor:
        """T, ``[V, D]``."""
        weight = self.trunk.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def get_output_embeddings(self) -> nn.Module:
        return self.trunk.get_output_embeddings()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As Hugging Face's; keeps the 2-D padding mask, which becomes a 4-D one for static caches."""
        generation: Any = GenerationMixin
        inputs = generation.prepare_inputs_for_generation(self, input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.ndim == 2 and inputs.get("input_ids") is not None:
            inputs["token_mask"] = attention_mask[:, -inputs["input_ids"].shape[1] :]
        return inputs

    def create_masks_for_generate(self, config: Any, **kwargs: Any) -> Any:
        """The masks of a static cache, by the trunk's configuration: ours does not say which attention runs."""
        trunk: Any = self.trunk
        create = getattr(trunk, "create_masks_for_generate", create_masks_for_generate)
        return create(config=trunk.config, **kwargs)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """What ``generate`` calls for steps over a static cache: CUDA graphs, if all of the model is on one device."""
        if self.device.type != "cuda" or not lies_on_one_device(self):
            return self.__call__
        options = options_within_a_graph(compile_config)
        if self._captured is None or self._captured.compile_options != options:
            self._captured = CapturedCalls(self, **options)
        return self._captured

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's. Graphs outlive it only with a cache that its caller made, and may use again."""
        generation: Any = super()
        if self._captured is not None:
            self._captured.forget_if_changed()
        try:
            return generation.generate(*args, **kwargs)
        finally:
            calls = self._captured
            for cache in [] if calls is None else calls.caches:
                if calls is not None and not getattr(cache, "_is_user_defined", False):
                    calls.forget(cache)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As PyTorch's; what moves or casts weights leaves graphs that read where they were."""
        self._captured = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy captures steps of its own."""
        return self.__dict__ | {"_captured": None}

    # ------------------------------------------------------------------ tokens → vectors → logits

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        trie: dict[str, Any] | None = None,
        token_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss where ``labels`` are given; what is not named here goes to the trunk as it is.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, past + T]``, 0 at padding. Padding is not there: tokens on both sides of it are
                neighbours, so that a padded batch gives what its bare rows give.
            inputs_embeds: ``[B, T, D]`` ready-made vectors (of `input_vectors`, where ``input_ids`` are given too);
                nothing is looked up or scaled then.
            labels: int64 ``[B, T]``, unshifted, -100 ignored.
            trie: what the data loader looked up (the arrays of a ``TrieBatch``); looked up here where missing.
            token_mask: ``[B, T]`` 0 at padding, where ``attention_mask`` is not two-dimensional.
            num_items_in_batch: predicted tokens of the whole step over processes and micro-batches; the loss is the
                sum over this batch divided by it.

        Raises:
            ValueError: a cache that another model filled, without the token history that looking up needs.
        """
        mask = token_mask
        if mask is None and input_ids is not None:
            mask = _new_columns(attention_mask, input_ids.shape[1], past_key_values)
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.input_vectors(input_ids, mask, past_key_values, trie)
        if use_cache is None and labels is not None:
            use_cache = False
        output = self.trunk(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if input_ids is not None and output.past_key_values is not None:
            extend_history(output.past_key_values, input_ids, mask)
        if labels is not None:
            output.loss = self.loss_function(
                output.logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return output

    def look_up(
        self,
        find: Callable[[np.ndarray, np.ndarray], np.ndarray],
        input_ids: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        context: int,
    ) -> np.ndarray:
        """What ``find`` says of the new positions, ``[B, T, …]``, when it sees at most ``context`` tokens before them.

        ``find`` takes tokens int64 and validity bool ``[B, L]`` on the host and answers ``[B, L, …]``.
        Raises ValueError for a cache without the history of its tokens.
        """
        history = known_past(cache, may_wait=False)
        new, seen = input_ids.shape[1], hidden(input_ids, mask)
        if isinstance(history, StaticTokenHistory):
            tokens, past = history.unpacked(history.window(seen, context).cpu().numpy(), context)
        else:
            past = 0 if history is None else history.get_seq_length()
            if history is not None and context:
                seen = torch.cat([history.last(context), seen], dim=1)
            tokens = seen.cpu().numpy()
        return answers(find, tokens, past, history, context, new)


def answers(
    find: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokens: np.ndarray,
    past: int,
    history: TokenHistory | None,
    context: int,
    new: int,
) -> np.ndarray:
    """As `EmbeddedTrunk.look_up`, of the ``new`` last columns of ``tokens`` [B, ≤ context + new], hidden ones among
    them; ``history`` has the ``past`` tokens before.
    """
    valid = tokens >= 0
    if valid.all():
        return find(tokens, valid)[:, -new:]
    if past > context and not valid[:, :-new].all():  # further back there may be tokens that padding kept away
        assert history is not None
        before = _padding_first(history.last(past).cpu().numpy())[0][:, past - context :]
        tokens = np.concatenate([before, tokens[:, -new:]], axis=1)
    tokens, order = _padding_first(tokens)
    valid = tokens >= 0
    found = find(np.where(valid, tokens, ~tokens), valid)
    in_place = np.empty_like(found)
    in_place[np.arange(len(order))[:, None], order] = found
    return in_place[:, -new:]


def _padding_first(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row of ``tokens`` [B, L] with its padding moved to the front, and the columns that they came from."""
    order = np.argsort(tokens >= 0, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, axis=1), order


def _new_columns(attention_mask: Any, new: int, cache: Cache | None) -> Tensor | None:
    """The part ``[B, new]`` of a two-dimensional mask that belongs to the new tokens; None where it has another form.

    A mask may be as long as a static cache, which has places after the new tokens.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    past = cache.get_seq_length() if cache is not None else 0
    return attention_mask[:, past:][:, :new] if attention_mask.shape[1] > past + new else attention_mask[:, -new:]
