"""Input vectors of each step, from the requests' own tokens: what vLLM's second model runner asks our models for.

Nothing is kept from step to step but one buffer. A request's tokens are all in vLLM's own table, whoever computed its
keys and values: so prefix hits, preemption, asynchronous scheduling, and drafts that were refused cannot go wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class InputVectorsState(DefaultModelState):
    """What vLLM asks for the inputs of each step, before it runs or replays the model."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, *others: Any) -> None:
        super().__init__(vllm_config, model, *others)
        self._model = model
        # always at the same place: CUDA graphs read it there
        self._vectors = torch.zeros(self.max_num_tokens, model.config.hidden_size, dtype=self.dtype, device=self.device)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """For steps that are only tried, or captured."""
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | {"inputs_embeds": self._vectors[:num_tokens]}

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The vectors of a step's tokens, and of its padding, which the last step has written to."""
        output = self._vectors[: input_batch.num_tokens_after_padding]
        tokens = input_batch.input_ids[: len(output)]
        vectors = self._model.embed_input_ids(tokens)
        lookup = self._model.lookup
        on_device = getattr(lookup, "on_device", None)
        if on_device is not None:
            requests = (
                input_batch.query_start_loc[: input_batch.num_reqs + 1],
                input_batch.idx_mapping[: input_batch.num_reqs],
                req_states.all_token_ids.gpu,
                req_states.num_computed_tokens.gpu,
            )
            on_device.look_up_ragged(vectors.contiguous(), output, tokens, *requests)
        else:
            output.copy_(vectors)
            if lookup is not None:
                step = _on_host(input_batch, req_states, tokens, lookup.context)
                lookup.put(output[: step[1][-1]], *step)
        return super().prepare_inputs(input_batch, req_states) | {"inputs_embeds": output}


def _on_host(input_batch: Any, req_states: Any, tokens: Tensor, context: int) -> tuple[np.ndarray, ...]:
    """New tokens ``[P]``, where requests begin ``[R + 1]``, and what is before them ``[R, C]``, in one transfer."""
    num_requests = input_batch.num_reqs
    slots = input_batch.idx_mapping[:num_requests]
    computed = req_states.num_computed_tokens.gpu[slots]
    at = computed[:, None] + torch.arange(-context, 0, device=tokens.device)
    before = req_states.all_token_ids.gpu[slots[:, None], at.clamp_(min=0)]
    # a launch takes longer than what is done by it: the rest is left to the host
    fetched = torch.cat([computed, before.flatten(), tokens]).cpu().numpy()
    known, past, new = np.split(fetched, [num_requests, num_requests + before.numel()])
    exists = known[:, None] >= np.arange(context, 0, -1)
    starts = input_batch.query_start_loc_np[: num_requests + 1]
    return new, starts, np.where(exists, past.reshape(num_requests, context), -1)
