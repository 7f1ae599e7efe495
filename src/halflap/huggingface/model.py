"""HalflapModel and HalflapForCausalLM: a HybridModel as transformers, TRL and PEFT know models.

Every linear map is called as a module, in training, prefill and decode alike, so an adapter on any of them is applied;
what the kernels read without a call (convolutions, gains) cannot carry one, and that is refused. The language head is
`lm_head`, tied to the embedding where the config says so. Padding of either side and packed rows: see rows.py.
Legend: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from halflap.checkpoints.checkpoint import Checkpoint, write_checkpoint
from halflap.checkpoints.config import lineage_step
from halflap.errors import HalflapError
from halflap.huggingface import files
from halflap.huggingface.cache import HalflapCache
from halflap.huggingface.configuration import HalflapConfig
from halflap.huggingface.rows import Rows, arrange
from halflap.models.cache import Cache
from halflap.models.decoder import Decoder
from halflap.models.linear import Linear
from halflap.models.meta import at_text
from halflap.models.model import HybridModel, initialize

RESERVED = 512  # new tokens for which cache memory is taken at once
DECODER: ContextVar[Decoder | None] = ContextVar("decoder", default=None)  # of the generate() that runs in this thread


class HalflapPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = HalflapConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["HybridModel"]  # noqa: RUF012 - what a pass knows is shared by its blocks: one device for all
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias"]  # noqa: RUF012 - as in every model that halflap loads
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012


class HalflapModel(HalflapPreTrainedModel):
    """The network without its language head."""

    def __init__(self, config: HalflapConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.network = HybridModel(config.model_config())
        self.network.head = None  # the language head is HalflapForCausalLM.lm_head
        if not self.network.embedding.weight.is_meta:
            initialize(self.network, int(torch.randint(2**31 - 1, ())))
        for module in self.network.modules():
            module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.embedding = value  # pyright: ignore[reportAttributeAccessIssue]
        vocabulary = len(value.weight)  # pyright: ignore[reportArgumentType]
        self.network.config = dataclasses.replace(self.network.config, vocab_size=vocabulary)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HalflapCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of input_ids (B, T), normalised as the language head reads them.

        attention_mask (B, T, or with a cache all tokens so far) is 0 for padding of either side; position_ids or
        seq_idx (B, T) separate packed documents. Without `use_cache` a cache is made where no gradient is wanted.
        """
        if input_ids is None or inputs_embeds is not None:
            raise HalflapError("halflap models read token ids and no inputs_embeds: pass input_ids")
        if output_attentions:
            raise HalflapError("attention weights are never made here; leave output_attentions out")
        if past_key_values is not None and not isinstance(past_key_values, HalflapCache):
            raise HalflapError(
                f"past_key_values is a {type(past_key_values).__name__}, which has no place for recurrent states: "
                "pass the one that an earlier pass returned, or a new halflap.hf.HalflapCache()"
            )
        implied = self.config.use_cache and not torch.is_grad_enabled()
        caching = past_key_values is not None or (implied if use_cache is None else use_cache)
        rows = arrange(input_ids, attention_mask, position_ids, seq_idx, cached=caching)
        if rows.segments is not None and caching:
            if past_key_values is not None or use_cache:
                raise HalflapError(
                    "position_ids or seq_idx say that rows hold several documents, and a cache continues one a row: "
                    "pass use_cache=False"
                )
            caching, rows = False, rows._replace(lengths=None)
        if input_ids.shape[1] > 1:
            self._refuse_silent_adapters()
        if caching and past_key_values is None:
            past_key_values = HalflapCache(input_ids.shape[1] + RESERVED)
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return self._run(input_ids.shape, rows, past_key_values, bool(every))

    def _run(self, shape: torch.Size, rows: Rows, cache: HalflapCache | None, every: bool) -> BaseModelOutputWithPast:
        state = None if cache is None else cache.begin(shape[0], shape[1], self._new_state)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        self.network.recompute = self._gradient_checkpointing_func if recompute else None
        lengths = rows.lengths if cache is not None else None
        with self._recorded(every) as recorded:
            hidden = self.network.hidden_states(rows.tokens, segments=rows.segments, cache=state, lengths=lengths)
        if cache is not None:
            cache.advance(shape[1])
        hidden = rows.restore(hidden)
        meta = self.network.config.num_meta_tokens
        texts = (at_text(output, rows.tokens, rows.segments, meta) for output in recorded[:-1])
        earlier = map(rows.restore, texts)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,  # pyright: ignore[reportArgumentType]
            past_key_values=cache,
            hidden_states=(*earlier, hidden) if every else None,  # pyright: ignore[reportArgumentType]
        )

    def _new_state(self, batch: int, capacity: int) -> Cache:
        if any(hasattr(module, "base_layer") for module in self.network.modules()):
            self.network.forget_meta_state()  # adapters are switched on and off without a parameter changing
        weight = self.network.embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        state = Cache.create(self.network.config, batch, capacity, dtype, weight.device)
        if self.network.meta_tokens is not None:
            state.start_from(self.network.meta_state(dtype, weight.device))
        return state

    @contextmanager
    def _recorded(self, wanted: bool) -> Iterator[list[Tensor]]:
        """The embedding's and every block's outputs of the passes within."""
        outputs: list[Tensor] = []
        watched = [self.network.embedding, *self.network.blocks] if wanted else []
        hooks = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in watched]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _refuse_silent_adapters(self) -> None:
        for name, module in self.network.named_modules():
            base = getattr(module, "base_layer", None)
            if base is not None and not isinstance(base, nn.Linear | nn.Embedding):
                raise HalflapError(
                    f"{name} carries an adapter that the kernels would pass over, because they read its weight without "
                    "a call; allowed are adapters on linear maps and the embedding: leave it out of target_modules"
                )


class HalflapForCausalLM(HalflapPreTrainedModel, GenerationMixin):
    """A language model of halflap for transformers' Auto classes, Trainer and generate(), for TRL and for PEFT."""

    _tied_weights_keys = {files.HEAD: files.EMBEDDING}  # noqa: RUF012

    def __init__(self, config: HalflapConfig) -> None:
        super().__init__(config)
        self.model = HalflapModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)  # pyright: ignore[reportArgumentType]
        self.lineage: list[dict[str, Any]] = []
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', whose arguments these are; on a CPU, tokens after the prompt run in native code.

        With bfloat16 weights that rounds less often than forward() does (models/decoder.py).
        """
        before = DECODER.set(self._decoder())
        try:
            return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            DECODER.reset(before)

    def _decoder(self) -> Decoder | None:
        """Of the weights as they are now; None where they lie elsewhere or something comes between."""
        network = self.model.network
        parameters = (*network.parameters(), *self.lm_head.parameters())
        if any(type(p) is not nn.Parameter or p.device.type != "cpu" for p in parameters):
            return None
        if any(hasattr(module, "_hf_hook") for module in self.modules()):  # accelerate's, which move weights
            return None
        return Decoder(network, self.lm_head)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HalflapCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in float32 or wider, of the last `logits_to_keep` tokens when that is not 0.

        labels (B, T) are the tokens themselves, -100 where there is no loss; each is predicted from those before it.
        The loss is their mean, or their sum over `num_items_in_batch`, which Trainer gives for accumulated gradients.
        """
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        plain = labels is None and inputs_embeds is None and not every and not output_attentions
        if plain and (quick := self._next_token(input_ids, attention_mask, past_key_values)) is not None:
            return CausalLMOutputWithPast(logits=quick, past_key_values=past_key_values)
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            use_cache, output_hidden_states, output_attentions, seq_idx, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _next_token(self, tokens: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor | None:
        """Logits (B, 1, V) by the decoder of generate() that is running; None where it cannot make this pass."""
        decoder = DECODER.get()
        if decoder is None or decoder.model is not self.model.network or tokens is None:
            return None
        if not isinstance(cache, HalflapCache) or cache.state is None or tokens.shape[1] != 1:
            return None
        state = cache.begin(len(tokens), 1, self.model._new_state)
        if not decoder.is_native(tokens, [state]) or arrange(tokens, mask, cached=True).lengths is not None:
            return None
        cache.advance(1)
        return decoder(tokens, state)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, length: int
    ) -> None:
        """Called by generate(): one cache of our kind with memory for the whole text, up to `RESERVED` at once."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic", "hybrid"):
            raise HalflapError(f"cache_implementation is {kind!r} and halflap has its own cache: leave it out")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HalflapCache(min(length + 1, RESERVED))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Open any directory that `halflap.load` opens, or a repository of the hub; keywords are transformers'.

        Raises HalflapError for what is wrong with the directory.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        directory = files.resolve(pretrained_model_name_or_path, kwargs)
        adapter = (kwargs.get("adapter_kwargs") or {}).pop("_adapter_model_path", None)
        if not isinstance(config, HalflapConfig):
            config = cls.config_class.from_pretrained(config or directory)  # pyright: ignore[reportOptionalMemberAccess]
        checkpoint = Checkpoint.open(directory)
        if "generation_config" not in kwargs and (directory / "generation_config.json").exists():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(directory)
        state = files.read_state(checkpoint, config.model_config())
        opened = super().from_pretrained(None, *model_args, config=config, state_dict=state, **kwargs)
        model = opened[0] if isinstance(opened, tuple) else opened
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        model.lineage = [*checkpoint.lineage, lineage_step("transformers", {directory.name: checkpoint.digest})]
        if adapter is not None:
            model.load_adapter(adapter, adapter_name=kwargs.get("adapter_name", "default"))
        return opened

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "4GB",
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint of ours, which `halflap.load` opens; with adapters attached, the adapters alone.

        The stock class's config.json and names are used where it can express the model, so that it opens without
        halflap too. Raises HalflapError for quantized weights and for parts that are missing.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        if push_to_hub:
            raise HalflapError("push_to_hub=True is not supported here; save first, then call .push_to_hub(REPOSITORY)")
        if getattr(self, "hf_quantizer", None) is not None:
            raise HalflapError("the weights are quantized and a checkpoint holds plain ones: save the adapters alone")
        if not is_main_process:
            return
        config = self.config.model_config()
        tensors = files.collect(state_dict or self.state_dict(), config)
        write_checkpoint(
            Path(save_directory),
            config,
            files.stream(tensors),
            dtype={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
            lineage=self.lineage,
            extra_files={"generation_config.json": self.generation_config.to_json_string()},
            max_shard_bytes=files.shard_bytes(max_shard_size),
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module, under the names of files too: Trainer reads its checkpoints back this way."""
        return super().load_state_dict(files.translate(state_dict, self.config.model_config()), strict, assign)
