"""SconeForCausalLM: any Hugging Face causal language model whose input embeddings know frequent n-grams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from scone.kernels.trie_batch import build_trie_batch
from scone.models.configuration import SconeConfig, check_table_weights, weights_fingerprint
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.input_embeddings import FGramBlock, FGramInputEmbedding, FGramModel
from scone.models.learned_rows import LearnedRows
from scone.models.row_files import ROWS_FOLDER
from scone.models.table_lookup import RowSource, TableLookup, find_with, looked_up
from scone.models.token_history import TokenHistory, marked, tensors_of
from scone.models.trunk import evaluating
from scone.tokenization.f_gram_file import FILE_NAME
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.utils.errors import SconeError


class SconeForCausalLM(EmbeddedTrunk):
    """A trunk behind a SCONE input embedding layer.

    ``trunk`` is an ordinary causal language model. Its input vectors come from ``f_gram_embedding`` (live: f-gram
    model, learned rows), or, once ``attach_table`` was called, from a table of precomputed rows. Which f-gram ends at
    each position is found here, from the token ids; the data loader may hand in the finished trie batch instead.
    """

    config_class = SconeConfig

    def __init__(self, config: SconeConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config, trunk)
        self.f_gram_embedding: FGramInputEmbedding | None = None
        self.table_embedding: TableLookup | None = None
        self.vocabulary: FGramVocabulary | None = None
        self.matcher: Matcher | None = None
        # the layers that sharding and device maps take as one
        self._no_split_modules = [*(self._no_split_modules or []), FGramBlock.__name__]
        width = self._token_weight().shape[1]
        if config.requires_table:
            self._keys_to_ignore_on_load_unexpected = [r"^f_gram_embedding\."]
        else:
            config.check_live()
            sizes, dtype = config.f_gram_model_config, getattr(torch, config.rows_dtype)
            self.f_gram_embedding = FGramInputEmbedding(
                FGramModel(sizes, width, config.max_n, config.vocab_size) if sizes else None,
                LearnedRows(config.learned_rows, width, dtype=dtype) if config.learned_rows else None,
                width,
                config.combination,
                config.initial_token_scale,
            )
        self.post_init()

    # ------------------------------------------------------------------ building, loading, saving

    @classmethod
    def from_trunk(  # type: ignore[override]
        cls,
        trunk: PreTrainedModel,
        vocabulary: FGramVocabulary,
        *,
        f_gram_model: dict | None,
        learned_rows: int = 0,
        **settings: Any,
    ) -> Self:
        """A SCONE model around ``trunk``, which keeps its weights. ``learned_rows`` is capped at the number of f-grams.
        ``settings``: ``combination``, ``rows_dtype``, ``embedding_scale`` and ``input_norm`` of `SconeConfig`.

        Raises SconeError when the vocabulary was counted for another number of tokens, or nothing would be learned.
        """
        rows = min(learned_rows, vocabulary.num_f_grams)
        if f_gram_model is None and rows == 0:
            raise SconeError("found neither an f-gram model nor learned rows; expected at least one; give one")
        model = super().from_trunk(
            trunk,
            f_gram_model=f_gram_model,
            learned_rows=rows,
            max_n=vocabulary.max_n,
            num_f_grams=vocabulary.num_f_grams,
            vocabulary_fingerprint=vocabulary.fingerprint,
            **settings,
        )
        model.set_vocabulary(vocabulary)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, table: RowSource | None = None, **kwargs: Any
    ) -> SconeForCausalLM:
        """As Hugging Face's, plus ``table``: serve from an embedding table, and load neither f-gram model nor rows.

        Raises SconeError when the vocabulary is missing or is not the one the model was trained with, or the table is
        not this model's: its weights are read once to be compared with those that the table says, unless its rows lie
        in shares.
        """
        config = kwargs.pop("config", None) or SconeConfig.from_pretrained(pretrained_model_name_or_path)
        config.requires_table = config.requires_table or table is not None
        model = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        where = {
            name: kwargs[name]
            for name in ("revision", "cache_dir", "token", "subfolder", "local_files_only")
            if name in kwargs
        }
        try:
            path = cached_file(str(pretrained_model_name_or_path), FILE_NAME, **where)
        except OSError as error:
            raise SconeError(
                f"found no {FILE_NAME} in {pretrained_model_name_or_path}; expected the model's f-gram "
                "vocabulary beside its weights; copy the whole final_model folder"
            ) from error
        loaded = model[0] if isinstance(model, tuple) else model  # output_loading_info=True gives a pair
        loaded.set_vocabulary(FGramVocabulary.load(str(path)))
        if table is not None:
            loaded.attach_table(table)
            loaded._check_weights_of(table, Path(str(path)).parent)
        return model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As Hugging Face's, plus the f-gram vocabulary and the file by which ``trust_remote_code`` finds us."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.vocabulary is not None and kwargs.get("is_main_process", True):
            self.vocabulary.save(Path(save_directory))

    def set_vocabulary(self, vocabulary: FGramVocabulary) -> None:
        """Give the model its f-grams. Raises SconeError when they are not those that it was built for."""
        found = (vocabulary.vocab_size, vocabulary.num_f_grams, vocabulary.fingerprint)
        expected = (self.config.vocab_size, self.config.num_f_grams, self.config.vocabulary_fingerprint)
        if found != expected:
            raise SconeError(
                "the f-gram vocabulary does not fit the model: found {} tokens, {} f-grams, fingerprint {:.12}; "
                "expected {}, {}, {:.12}; use the f_grams.safetensors saved with the model".format(*found, *expected)
            )
        self.vocabulary = vocabulary
        self.matcher = Matcher(vocabulary)
        if self.table_embedding is not None:
            self.attach_table(self.table_embedding.table)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As Hugging Face's. No f-gram contains an added token; the f-grams' nodes move behind the last token.

        Tables of before belong to the model of before: precompute them again; one that is attached is let go. Raises
        SconeError, before anything changes, when an f-gram would lose a token, or when the model has no weights to
        precompute a table from.
        """
        if self.f_gram_embedding is None:
            raise SconeError(
                "found a model that runs from its embedding table alone; expected the trained one, since added tokens "
                "need another table; resize that one, and precompute its table"
            )
        vocabulary = self.vocabulary
        if vocabulary is not None:
            wanted = len(self._token_weight()) if new_num_tokens is None else new_num_tokens
            multiple = pad_to_multiple_of or 1
            vocabulary = vocabulary.resized(-(-wanted // multiple) * multiple)
        self.table_embedding = None
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.f_gram_embedding.f_gram_model is not None:
            self.f_gram_embedding.f_gram_model.resize_tokens(self.config.vocab_size)
        if vocabulary is not None:
            self.config.vocabulary_fingerprint = vocabulary.fingerprint
            self.set_vocabulary(vocabulary)
        return embeddings

    def attach_table(self, table: RowSource) -> None:
        """Serve matched positions from ``table`` from now on.

        Raises SconeError when its shape does not fit, or it says that it was made for other f-grams. Whether it was
        made from the weights that the model has is not looked at.
        """
        expected = (self.config.num_f_grams, self._token_weight().shape[1])
        if (table.num_rows, table.width) != expected:
            raise SconeError(
                f"the embedding table does not fit the model: found {table.num_rows} rows of width {table.width}; "
                f"expected {expected[0]} rows of width {expected[1]}; precompute it again from this model"
            )
        assert self.matcher is not None, "a table belongs to a vocabulary: call set_vocabulary"
        found, known = _said_of(table).get("vocabulary", ""), self.config.vocabulary_fingerprint
        if found and found != known:
            raise SconeError(
                f"the embedding table does not fit the model: found rows of as many other f-grams ({found[:12]}); "
                f"expected those of {known[:12]}; give the table that belongs to this model, or precompute it again"
            )
        self.table_embedding = TableLookup(table, self.matcher)

    def _check_weights_of(self, table: RowSource, folder: Path) -> None:
        path = getattr(table, "path", None)
        if path is not None and not (folder / ROWS_FOLDER).exists():
            check_table_weights(folder, self._token_weight(), path, _said_of(table))

    def table_fingerprints(self) -> dict[str, str]:
        """What a table made from this model must carry: the f-gram vocabulary, and the weights that rows depend on.

        Raises SconeError when the model was loaded without those weights.
        """
        assert self.vocabulary is not None, "a table belongs to a vocabulary"
        state = {} if self.f_gram_embedding is None else self.f_gram_embedding.state_dict()
        weights = weights_fingerprint(self._token_weight(), state)
        return {"vocabulary": self.vocabulary.fingerprint, "weights": weights}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FGramInputEmbedding):
            module.init_weights()

    # ------------------------------------------------------------------ tokens → nodes → vectors

    def vectors_of(
        self, input_ids: Tensor, tokens: Tensor, history: TokenHistory | None, trie: dict[str, Any] | None
    ) -> Tensor:
        """Of a table, or live: see the base class."""
        if self.table_embedding is not None:
            return self.table_embedding(self.get_input_embeddings()(input_ids), tokens, history)  # type: ignore[no-any-return]
        return self._live_vectors(input_ids, tokens, history, trie)

    @torch.compiler.disable(
        reason="the sizes of a trie batch depend on the tokens; only a table's lookup fits in a graph"
    )
    def _live_vectors(
        self, input_ids: Tensor, tokens: Tensor, history: TokenHistory | None, trie: dict[str, Any] | None
    ) -> Tensor:
        if self.f_gram_embedding is None:
            raise SconeError(
                "found a model that was saved without its f-gram model; expected its embedding table; "
                "give --embedding_cache_path"
            )
        if trie is None:
            trie = self.trie_of(self._nodes_of(tokens, history))
        return self.f_gram_embedding(input_ids, self.get_input_embeddings(), trie)

    def match(self, input_ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """Node ids int64 ``[B, T]``: the longest f-gram ending at each position."""
        return self._nodes_of(marked(input_ids, mask), None)

    def _nodes_of(self, tokens: Tensor, history: TokenHistory | None) -> np.ndarray:
        assert self.matcher is not None, "the model has no f-gram vocabulary: call set_vocabulary"
        # no f-gram is longer than N, so N - 1 tokens of context decide every match
        return looked_up(find_with(self.matcher), tokens, self.matcher.vocabulary.max_n - 1, *tensors_of(history))

    def trie_of(self, nodes: np.ndarray) -> dict[str, Any]:
        """The trie batch of ``nodes``; its arrays as tensors on the model's device."""
        assert self.vocabulary is not None
        vocabulary = self.vocabulary
        batch = build_trie_batch(
            nodes,
            vocabulary.keys,
            vocabulary.suffixes,
            vocabulary.vocab_size,
            vocabulary.max_n,
            self.config.learned_rows,
        )
        device = self._token_weight().device
        return batch.fields(lambda array: torch.from_numpy(array).to(device))

    @torch.no_grad()
    def embed_nodes(self, nodes: Tensor) -> Tensor:
        """e(node), fp32 ``[n, D]`` on the model's device, for f-grams (or tokens) ``nodes`` int64 [n] on any.

        From the live layer. This is the row that a table stores; the nodes share their prefixes as in training.
        """
        assert self.vocabulary is not None
        if self.f_gram_embedding is None:
            raise SconeError("found a model without f-gram model; expected the trained model; load it without a table")
        ids = nodes.cpu().numpy()
        size = self.config.vocab_size
        last = np.where(ids >= size, self.vocabulary.last_tokens[np.maximum(ids - size, 0)], ids).astype(np.int64)
        tokens = self.get_input_embeddings()
        token_ids = torch.from_numpy(last)[None].to(self._token_weight().device)
        with evaluating(self):
            vectors = self.f_gram_embedding(token_ids, tokens, self.trie_of(ids[None]))
        return vectors[0].float()


def _said_of(table: RowSource) -> Mapping[str, str]:
    """Fingerprints of what a table was made from, where it is read from a file."""
    found: Mapping[str, str] = getattr(table, "fingerprints", {})
    return found


AutoConfig.register("scone", SconeConfig, exist_ok=True)
AutoModelForCausalLM.register(SconeConfig, SconeForCausalLM, exist_ok=True)
