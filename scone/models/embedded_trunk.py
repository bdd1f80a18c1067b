"""A trunk behind an input embedding layer of ours: what all such models share, whatever the layer is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import CompileConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from scone.models.configuration import EmbeddedTrunkConfig
from scone.models.learned_rows import LearnedRows
from scone.models.token_history import StaticTokenHistory, TokenHistory, extend_history, hidden, known_past


class EmbeddedTrunk(PreTrainedModel, GenerationMixin):
    """``trunk``, an ordinary causal language model, whose input vectors come from ``embed``.

    A subclass gives ``embed``, the number of tokens before a position that it depends on, and its layer.
    """

    config_class = EmbeddedTrunkConfig
    base_model_prefix = "body"
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
        self.trunk.config.return_dict = True  # tuples are made here
        self._no_split_modules = list(self.trunk._no_split_modules or [])
        self._embedding_place: tuple[str, ...] = ()
        self._body: list[TrunkBody] = []  # in a list it is no part of the model: its parts are ours

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
        vectors = self.embed(input_ids, mask, cache, trie)
        return vectors if self.config.embedding_scale == 1.0 else vectors * self.config.embedding_scale

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As Hugging Face's, plus the file by which ``trust_remote_code`` finds us."""
        # sharding puts a class of its own in front of ours
        model_class = next(ours for ours in type(self).__mro__ if ours.__module__.startswith("scone."))
        names: dict[str, type] = {"AutoConfig": type(self.config), "AutoModelForCausalLM": model_class}
        self.config.auto_map = {auto: f"modeling_scone.{ours.__name__}" for auto, ours in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            path = Path(save_directory) / "modeling_scone.py"
            path.write_text(_remote_code(*names.values()), encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a body of its own."""
        return self.__dict__ | {"_body": []}

    # ------------------------------------------------------------------ Hugging Face's questions

    @property
    def body(self) -> TrunkBody:
        """All but the head: what ``base_model`` is, to which losses that never make whole logits apply the head."""
        if not self._body:
            self._body.append(TrunkBody(self))
        return self._body[0]

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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As Hugging Face's, of the trunk: tokens are added at the end, or taken away there."""
        embeddings = self.trunk.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.text_config.vocab_size = self.trunk.config.get_text_config().vocab_size
        return embeddings

    def _token_weight(self) -> Tensor:
        """T, ``[V, D]``."""
        weight = self.trunk.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What ``DistributedDataParallel`` leaves alone: rows that a row optimizer keeps alike on all ranks."""
        rows = [(name, part) for name, part in self.named_modules() if isinstance(part, LearnedRows)]
        return [f"{name}.weight" for name, part in rows if part.are_collected]

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
        """What ``generate`` calls for steps over a static cache: not compiled, since the host looks up in between."""
        return self.__call__

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
        return_dict: bool | None = None,
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
            return_dict: False gives a tuple, the loss first; None: as the configuration says.

        Raises:
            ValueError: a cache that another model filled, without the token history that looking up needs.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        output = self._run(
            self.trunk,
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            trie,
            token_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if labels is not None:
            loss = self.loss_function(
                output.logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            output = type(output)(**{**output, "loss": loss})
        return self._returned(output, return_dict)

    def _run(
        self,
        part: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        trie: dict[str, Any] | None,
        token_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """The output of ``part``, the trunk or its body, for our input vectors; arguments are those of `forward`."""
        mask = token_mask
        if mask is None and input_ids is not None:
            mask = _new_columns(attention_mask, input_ids.shape[1], cache)
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.input_vectors(input_ids, mask, cache, trie)
        output = part(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            return_dict=True,
            **kwargs,
        )
        if input_ids is not None and output.past_key_values is not None:
            extend_history(output.past_key_values, input_ids, mask)
        return output

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """``output``, or the tuple of it, as the caller or else the configuration wants it."""
        as_dictionary = self.config.return_dict if return_dict is None else return_dict
        return output if as_dictionary else output.to_tuple()

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


class TrunkBody(nn.Module):
    """A model of ours without its head: hidden states of *our* input vectors.

    Where others look for a language model's body (``base_model``, ``get_decoder()``), they must find no part of the
    trunk: it would embed token ids by itself, without n-grams. Whatever is not here is the trunk's own body's.
    """

    def __init__(self, model: EmbeddedTrunk) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        trie: dict[str, Any] | None = None,
        token_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """``last_hidden_state`` ``[B, T, D]`` and what else the trunk's body gives; see `EmbeddedTrunk.forward`."""
        model = self.model
        inputs = (input_ids, attention_mask, past_key_values, inputs_embeds, trie, token_mask)
        return model._returned(model._run(model.trunk.base_model, *inputs, **kwargs), return_dict)

    def get_decoder(self) -> nn.Module:
        return self

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model: Any = super().__getattr__("model")
            return getattr(model.trunk.base_model, name)


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


def _remote_code(*classes: type) -> str:
    """Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds ``classes``."""
    imports = "\n".join(f"from {ours.__module__} import {ours.__name__}" for ours in classes)
    names = ", ".join(f'"{ours.__name__}"' for ours in classes)
    return (
        '"""Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds SCONE."""\n\n'
        f"{imports}\n\n__all__ = [{names}]\n"
    )
