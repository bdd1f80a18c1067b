"""A trunk behind an input embedding layer of ours: what all such models share, whatever the layer is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from scone.models.configuration import EmbeddedTrunkConfig
from scone.models.learned_rows import LearnedRows
from scone.models.row_files import ROWS_FOLDER, load_shares
from scone.models.token_history import CACHE, TokenHistory, extend_history, known_past, marked, starts_of_examples
from scone.models.trunk import check_positions, per_layer_inputs, routing_loss, train_every_token
from scone.utils.errors import SconeError
from scone.utils.files import give_umask_mode


class EmbeddedTrunk(PreTrainedModel, GenerationMixin):
    """``trunk``, an ordinary causal language model, whose input vectors come from a layer of ours.

    A subclass has the layer, and ``vectors_of`` of it.
    """

    config_class = EmbeddedTrunkConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 (the library's; what is tied, is tied within the trunk)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EmbeddedTrunkConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.trunk = AutoModelForCausalLM.from_config(config.text_config) if trunk is None else trunk
        check_positions(self.trunk.config)
        self.trunk.config.return_dict = True  # tuples are made here
        train_every_token(self.trunk)
        self._tokens_in_layers = config.reads_tokens_in_layers
        self._no_split_modules = list(self.trunk._no_split_modules or [])
        self._embedding_place: tuple[str, ...] = ()
        self.input_norm = nn.RMSNorm(self._token_weight().shape[1], eps=1e-6) if config.input_norm else None
        self._body: list[TrunkBody] = []  # in a list it is no part of the model: its parts are ours

    @classmethod
    def from_trunk(cls, trunk: PreTrainedModel, **settings: Any) -> Self:
        """A model around ``trunk``, which keeps its weights; ``settings`` are its configuration's."""
        # a copy: building the composite resets fields of its part
        config = cls.config_class(text_config=copy.deepcopy(trunk.config), **settings)
        model = cls(config, trunk=trunk)
        model.generation_config = trunk.generation_config
        return model

    def vectors_of(
        self, input_ids: Tensor, tokens: Tensor, history: TokenHistory | None, trie: dict[str, Any] | None
    ) -> Tensor:
        """Vectors ``[B, T, D]``, not `scaled` yet, of ``input_ids`` that follow ``history``: here T of each token.

        ``tokens`` are the same as `marked` writes them; ``trie`` is what the data loader has looked up already.
        """
        vectors: Tensor = self.get_input_embeddings()(input_ids)
        return vectors

    def input_vectors(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        trie: dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What the trunk gets, ``[B, T, D]``, of tokens that follow what ``cache`` holds: see `forward`."""
        history = known_past(cache)
        tokens = _marked(input_ids, mask, history, position_ids)
        return self.scaled(self.vectors_of(input_ids, tokens, history, trie))

    def scaled(self, vectors: Tensor) -> Tensor:
        """Of `vectors_of`, normalised and scaled as configured."""
        if self.input_norm is not None:
            # in the precision of its gain, which a trunk that was converted to fp16 does not share
            vectors = self.input_norm(vectors.to(self.input_norm.weight.dtype)).to(vectors.dtype)
        return vectors if self.config.embedding_scale == 1.0 else vectors * self.config.embedding_scale

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Hugging Face's; of the checkpoint of a run of several processes, with the rows that lie beside it."""
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        loaded, info = model if isinstance(model, tuple) else (model, None)
        shares = Path(pretrained_model_name_or_path) / ROWS_FOLDER
        if shares.is_dir():
            for name, rows in loaded._rows():
                load_shares(shares, {"weight": rows.weight.detach()}, rows.shards)
                if info is not None:
                    info["missing_keys"] = set(info["missing_keys"]) - {f"{name}.weight"}
        return model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As Hugging Face's, plus the file by which ``trust_remote_code`` finds us.

        Raises SconeError where learned rows are shared out over processes, and no ``state_dict`` is given.
        """
        if "state_dict" not in kwargs and any(rows.exchange is not None for _, rows in self._rows()):
            raise SconeError(
                "found learned rows that are shared out over processes; expected them in one place to save the model; "
                "save it as the trainer does: without rows on the first process, then row_files.append_rows on all"
            )
        # sharding puts a class of its own in front of ours
        model_class = next(ours for ours in type(self).__mro__ if ours.__module__.startswith("scone."))
        names: dict[str, type] = {"AutoConfig": type(self.config), "AutoModelForCausalLM": model_class}
        self.config.auto_map = {auto: f"modeling_scone.{ours.__name__}" for auto, ours in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_remote_code(Path(save_directory), *names.values())
            give_umask_mode(Path(save_directory), "*.safetensors")

    def initialize_weights(self) -> None:
        """As Hugging Face's, of the trunk first and as of a model by itself.

        Below a class that is not transformers' own, a module without weights counts as loaded, and buffers that are
        filled there stay as memory was: Falcon-H1's.
        """
        self.trunk.initialize_weights()
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LearnedRows):
            module.reset()

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
        return [f"{name}.weight" for name, rows in self._rows() if rows.are_collected or rows.exchange is not None]

    def _rows(self) -> list[tuple[str, LearnedRows]]:
        return [(name, part) for name, part in self.named_modules() if isinstance(part, LearnedRows)]

    def get_output_embeddings(self) -> nn.Module:
        return self.trunk.get_output_embeddings()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As Hugging Face's; keeps the 2-D padding mask, which becomes a 4-D one for static caches."""
        generation: Any = GenerationMixin
        inputs = generation.prepare_inputs_for_generation(self, input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.ndim == 2 and inputs.get("input_ids") is not None:
            new = attention_mask[:, -inputs["input_ids"].shape[1] :]
            # a view has other strides in every step, for which a compiled step would be compiled anew
            inputs["token_mask"] = new.clone(memory_format=torch.contiguous_format)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate_batch`` and ``transformers serve`` begin with. Raises SconeError: see `_PAGED`."""
        raise SconeError(_PAGED)

    def create_masks_for_generate(self, config: Any, **kwargs: Any) -> Any:
        """The masks of a static cache, by the trunk's configuration: ours does not say which attention runs."""
        trunk: Any = self.trunk
        create = getattr(trunk, "create_masks_for_generate", create_masks_for_generate)
        return create(config=trunk.config, **kwargs)

    # ------------------------------------------------------------------ tokens → vectors → logits

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        trie: dict[str, Any] | None = None,
        token_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss where ``labels`` are given; what is not named here goes to the trunk as it is.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, past + T]``, 0 at padding. Padding is not there: tokens on both sides of it are
                neighbours, so that a padded batch gives what its bare sequences give.
            position_ids: ``[B, T]``. Where they start again, another example of a packed sequence begins, and what is
                before it is not seen; ``cu_seq_lens_q`` and ``seq_idx`` of data collators say the same.
            cache: what earlier calls left of the tokens before; ``past_key_values`` is the same by its older name. The
                output has it under the name that the installed transformers uses.
            inputs_embeds: ``[B, T, D]`` ready-made vectors of ``input_ids`` (of `input_vectors`); nothing is looked up
                or scaled then.
            labels: int64 ``[B, T]``, unshifted, -100 ignored.
            trie: what the data loader looked up (the arrays of a ``TrieBatch``); looked up here where missing.
            token_mask: ``[B, T]`` 0 at padding, where ``attention_mask`` is not two-dimensional.
            num_items_in_batch: predicted tokens of the whole step over processes and micro-batches; the loss is the
                sum over this batch divided by it.
            return_dict: False gives a tuple, the loss first; None: as the configuration says.

        Raises:
            ValueError: a cache that another model filled, without the token history that looking up needs; two caches;
                vectors without their tokens.
            SconeError: a paged cache of continuous batching.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        inputs = (input_ids, attention_mask, position_ids, cache, inputs_embeds, trie, token_mask, past_key_values)
        output = self._run(self.trunk, *inputs, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None:
            loss = self.loss_function(
                output.logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            output = type(output)(**{**output, "loss": loss + routing_loss(self.trunk, output)})
        return self._returned(output, return_dict)

    def _run(
        self,
        part: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        trie: dict[str, Any] | None = None,
        token_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The output of ``part``, the trunk or its body, for our input vectors; arguments are those of `forward`."""
        if cache is not None and past_key_values is not None:
            raise ValueError(f"found a cache and past_key_values; expected one of them; give {CACHE} alone")
        cache = past_key_values if cache is None else cache
        if input_ids is None:
            raise ValueError("found no input_ids; expected tokens" if inputs_embeds is None else _NO_TOKENS)
        if "write_index" in kwargs:
            raise SconeError(_PAGED)
        mask = token_mask
        if mask is None:
            mask = _new_columns(attention_mask, input_ids.shape[1], cache)
        history = known_past(cache)
        tokens = _marked(input_ids, mask, history, position_ids, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
        if inputs_embeds is None:
            inputs_embeds = self.scaled(self.vectors_of(input_ids, tokens, history, trie))
        if self._tokens_in_layers and kwargs.get("per_layer_inputs") is None:
            kwargs["per_layer_inputs"] = per_layer_inputs(self.trunk, input_ids)
        output = part(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        cache = getattr(output, CACHE)
        if cache is not None:
            extend_history(cache, tokens)
        return output

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """``output``, or the tuple of it, as the caller or else the configuration wants it."""
        as_dictionary = self.config.return_dict if return_dict is None else return_dict
        return output if as_dictionary else output.to_tuple()


class TrunkBody(nn.Module):
    """A model of ours without its head: hidden states of *our* input vectors.

    Where others look for a language model's body (``base_model``, ``get_decoder()``), they must find no part of the
    trunk: it would embed token ids by itself, without n-grams. Whatever is not here is the trunk's own body's.
    """

    def __init__(self, model: EmbeddedTrunk) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """``last_hidden_state`` ``[B, T, D]`` and what else the trunk's body gives; see `EmbeddedTrunk.forward`."""
        model = self.model
        return model._returned(model._run(model.trunk.base_model, *args, **kwargs), return_dict)

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


def write_remote_code(folder: Path, *classes: type) -> None:
    """Write ``modeling_scone.py``, which hands ``classes`` on, or says in one line what to install.

    transformers tells users to install what it finds missing by the name of the import, and on the package index that
    name is a stranger's. It does not look at imports inside of ``try``.
    """
    imports = "\n".join(f"    from {ours.__module__} import {ours.__name__}" for ours in classes)
    names = ", ".join(f'"{ours.__name__}"' for ours in classes)
    text = f'''\
"""Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds SCONE."""

try:
{imports}
except Exception as error:  # a package of another time fails in ways of its own
    raise ImportError(
        f"this model needs SCONE, which cannot be imported here ({{error}}); install it: pip install scone-lm "
        "(the package that is named scone is another one, and has to go: pip uninstall scone)"
    ) from None

__all__ = [{names}]
'''
    (folder / "modeling_scone.py").write_text(text, encoding="utf-8")


# Its paged cache carries no tokens: each step would be embedded as the beginning of a text. A history beside its slots
# would have to follow what it does to them (sharing, copying, moving to the host), which changes with every version.
_PAGED = (
    "found continuous batching of transformers, whose paged cache does not keep the tokens that f-grams need; expected "
    "generate, with the prompts as one padded batch, or `scone serve`, which batches requests"
)
_NO_TOKENS = (
    "found inputs_embeds without input_ids; expected the tokens too, in which n-grams are found (soft prompts, such as "
    "PEFT's prompt tuning, hand in vectors alone and do not work here); give input_ids, or give vectors that are ready "
    "to model.trunk(inputs_embeds=…)"
)


def _marked(
    input_ids: Tensor,
    mask: Tensor | None,
    history: TokenHistory | None,
    position_ids: Tensor | None = None,
    bounds: Tensor | None = None,
    example_of: Tensor | None = None,
) -> Tensor:
    """`marked` tokens. Where examples begin say ``position_ids``; ``bounds``, int ``[examples + 1]``, of all examples,
    one after the other; and ``example_of``, the number of each token's example, ``[B, T]``.
    """
    length, starts = input_ids.shape[1], None
    if position_ids is not None:
        # models that count in several dimensions have text's first
        position_ids = position_ids[0] if position_ids.ndim == 3 else position_ids
        starts = starts_of_examples(position_ids[:, -length:], mask, history is not None)
    if bounds is not None:
        flat = torch.zeros(input_ids.numel() + 1, dtype=torch.bool, device=input_ids.device)
        begun = flat.index_fill(0, bounds[1:].long(), True)[:-1].view_as(input_ids)
        starts = begun if starts is None else starts | begun
    if example_of is not None:
        begun = nn.functional.pad(example_of.diff(dim=1) != 0, (1, 0))
        starts = begun if starts is None else starts | begun
    return marked(input_ids, mask, starts)


def _new_columns(attention_mask: Any, new: int, cache: Cache | None) -> Tensor | None:
    """The part ``[B, new]`` of a two-dimensional mask that belongs to the new tokens; None where it has another form.

    A mask may be as long as a static cache, which has places after the new tokens.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    if cache is None or attention_mask.shape[1] == new:
        return attention_mask[:, -new:]
    past = cache.get_seq_length()
    if isinstance(past, Tensor):  # of a static cache, which is not waited for
        at = torch.arange(new, device=attention_mask.device) + past
        return attention_mask.index_select(1, at.clamp(max=attention_mask.shape[1] - 1))
    return attention_mask[:, past:][:, :new] if attention_mask.shape[1] > past + new else attention_mask[:, -new:]
