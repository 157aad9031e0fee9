"""verl: an agent loop that plays our environments, and ATOD as a trainer mode. Tested with 0.9.1.

Load this module in every process of verl: VERL_USE_EXTERNAL_MODULES=atod_train.adapters.verl in
the environment. Then `trainer.v1.trainer_mode=atod` is verl's synchronous trainer, and after its
own advantages, such as those of GRPO, come ATOD's: kappa w_k delta_t + rho A (Eq. 8). The teacher
is what verl's reference worker holds; `+trainer.v1.atod.teacher=<model>` names it. The other
settings have the names of `AlgorithmConfig`, as in `+trainer.v1.atod.kappa=[1,0.1]`; schedules that
follow the run (adaptive, gap, handoff without a number) are those of atod-train alone. An advantage
estimator of verl would not do: it is given rewards and masks, neither log-probs nor the step.

`ATODAgentLoop` plays a row of `atod_gym.adapters.verl.task_dataset`; a file for
`actor_rollout_ref.rollout.agent.agent_loop_config_path` says how:

    - name: atod
      _target_: atod_train.adapters.verl.ATODAgentLoop
      max_completion_tokens: 512
      env: {id: atod/ALFWorld-v0, data: official, prompt_style: window, max_turns: 50}

In window style every turn is a row of its own, as in the published runs.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args
from uuid import uuid4

import numpy as np
import torch

from atod_gym.errors import InvalidSettingError, MissingExtraError
from atod_train.adapters.objective import Variant, mixed_advantages
from atod_train.adapters.token_rows import TokenPlayer, outcome, rows_of
from atod_train.algorithm.atod import Schedule
from atod_train.algorithm.schedules import has_state, schedule_of
from atod_train.config import AlgorithmConfig, EnvConfig
from atod_train.models.dialogue import DialogueEncoder
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.episode import Limits

try:
    import transfer_queue
    from omegaconf import DictConfig, OmegaConf, open_dict
    from tensordict import TensorDict
    from verl.experimental.agent_loop.agent_loop import (
        AgentLoopBase,
        AgentLoopMetrics,
        AgentLoopOutput,
    )
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1 import register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine_workers import ActorRolloutRefWorker
    from verl.workers.utils.padding import response_to_nested
except ImportError as error:
    raise MissingExtraError(
        f"The adapter for verl needs packages that are not installed ({error.name}): "
        "pip install 'atod-gym[train,verl]'"
    ) from error

MODE = "atod"
"""The trainer mode."""


@dataclass(frozen=True)
class ATODSettings:
    """The settings under `trainer.v1.atod`; those left out are the paper's."""

    schedule: Schedule
    """Kappa and rho over the steps."""
    turn_weights: Variant
    teacher: str = ""
    """Folder or hub name of the teacher; empty: no teacher's part, whatever kappa is."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ATODSettings:
        """Read what a user gave: `teacher`, and settings named as in `AlgorithmConfig`.

        Raises:
            InvalidSettingError: an unknown name, or values out of range.
        """
        known = ("kappa", "rho", "schedule", "teacher", "turn_weights")
        if unknown := sorted(set(config) - set(known)):
            raise InvalidSettingError(
                f"trainer.v1.atod has no setting {unknown[0]!r}; known: {', '.join(known)}."
            )
        values = dict(config)
        teacher = str(values.pop("teacher", ""))
        settings = AlgorithmConfig(**values)
        try:
            if settings.turn_weights not in get_args(Variant):
                raise ValueError(
                    f"turn_weights={settings.turn_weights} is one of atod-train alone; choose one "
                    f"of {', '.join(get_args(Variant))}"
                )
            if has_state(settings):
                raise ValueError(
                    f"schedule={settings.schedule} follows the run and is one of atod-train alone; "
                    "choose linear:80, cosine:80, constant or handoff:40"
                )
            return cls(schedule_of(settings), cast(Variant, settings.turn_weights), teacher)
        except (TypeError, ValueError) as error:
            raise InvalidSettingError(f"trainer.v1.atod: {error}.") from error


_free: dict[tuple[str, str], list[EnvPool]] = defaultdict(list)
"""Environments that no episode of this process plays, by settings and split."""


class ATODAgentLoop(AgentLoopBase):
    """Play the task that a row of the data set names, token for token as our own trainer does.

    Args:
        *args: verl's.
        env: settings of `atod_train.config.EnvConfig`.
        max_completion_tokens: of a turn; `data.max_response_length` limits a row.
        **kwargs: verl's.

    In chat style an episode is one row and ends where its next turn would not fit
    `data.max_response_length`; in window style every turn is a row, and its prompt leaves out past
    turns where it would not fit `data.max_prompt_length`. Neither outgrows `max_model_len` of
    `actor_rollout_ref.rollout`, where that is set.
    """

    def __init__(
        self,
        *args: Any,
        env: Mapping[str, Any] | None = None,
        max_completion_tokens: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        given = OmegaConf.to_container(env, resolve=True) if isinstance(env, DictConfig) else env
        try:
            self.env_config = EnvConfig(**dict(given or {}))
        except TypeError as error:
            raise InvalidSettingError(f"The agent loop's env: {error}.") from error
        self.encoder = DialogueEncoder(
            self.tokenizer, self.env_config.prompt_style, self.env_config.template_options
        )
        prompt = int(self.rollout_config.prompt_length)
        response = int(self.rollout_config.response_length)
        completion = min(max_completion_tokens, response)
        engine = int(self.rollout_config.max_model_len or prompt + response)
        if self.encoder.style == "window":
            self.limits = Limits(completion, min(prompt + completion, engine))
        else:
            context = min(prompt + response, engine)
            self.limits = Limits(completion, context, prompt, can_restart=False)

    async def run(
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Play one episode.

        Args:
            sampling_params: verl's.
            **kwargs: the row; `extra_info` holds `task_id` and `split`.

        Returns:
            One output in chat style, one for each turn in window style.
        """
        row = kwargs["extra_info"]
        split = str(row.get("split", "train"))
        free = _free[repr(self.env_config), split]
        pool = free.pop() if free else await asyncio.to_thread(EnvPool, self.env_config, split)
        extras: list[dict[str, Any]] = []
        try:
            player = TokenPlayer(pool, self.encoder, self.limits)
            [episode] = await asyncio.to_thread(pool.start, [str(row["task_id"])])
            request = uuid4().hex
            asked = {**sampling_params, "max_tokens": self.limits.completion}
            while episode.stop_reason is None:
                ids = await asyncio.to_thread(player.next_prompt, episode)
                if ids is None:
                    break
                sampled = await self.server_manager.generate(
                    request_id=request, prompt_ids=ids, sampling_params=dict(asked)
                )
                extras.append(dict(sampled.extra_fields))
                await asyncio.to_thread(
                    player.play, [episode], [sampled.token_ids], [sampled.log_probs]
                )
        finally:
            free.append(pool)
        return self._outputs(episode.trajectory(), extras)

    def _outputs(
        self, record: Trajectory, extras: Sequence[dict[str, Any]]
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Return the rows of an episode; `extras` are the engine's fields for each turn."""
        is_window = self.encoder.style == "window"
        extras = extras or [{}]
        if not is_window:
            # The oldest weights that sampled a dialogue are those of its first turn.
            oldest = {k: v for k, v in extras[0].items() if k == "min_global_steps"}
            extras = [{**extras[-1], **oldest}]
        outputs = [
            AgentLoopOutput(
                prompt_ids=row.prompt_ids,
                response_ids=row.response_ids,
                response_mask=row.mask,
                response_logprobs=row.logprobs,
                reward_score=record.episode_return,
                num_turns=2 * len(record.turns),
                metrics=AgentLoopMetrics(),
                extra_fields={
                    **extra,
                    "reward_extra_info": outcome(record),
                    "turn_scores": [],
                    "tool_rewards": [],
                },
            )
            for row, extra in zip(rows_of(record, self.encoder.end_of_turn_id), extras, strict=True)
        ]
        return outputs if is_window else outputs[0]


class TeacherWorker(ActorRolloutRefWorker):
    """verl's worker, whose reference model is the teacher that `config.ref.atod_teacher` names."""

    ref_worker_cls: Any

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def init_model(self) -> None:
        """Build the models."""
        with open_dict(self.config.ref):
            teacher = self.config.ref.pop("atod_teacher", "")
        inner = self.ref_worker_cls
        if teacher:
            model = OmegaConf.merge(self.config.model, {"path": teacher, "tokenizer_path": teacher})

            def build(config: Any) -> Any:
                chosen = omega_conf_to_dataclass(model)
                chosen.mtp = config.model_config.mtp
                return inner(config=replace(config, model_config=chosen))

            self.ref_worker_cls = build
        super().init_model()
        self.ref_worker_cls = inner


@register_trainer(MODE)
class ATODTrainer(PPOTrainerSync):
    """verl's synchronous trainer with ATOD's advantages after its own.

    Raises:
        InvalidSettingError: settings that make no sense, or a teacher without a reference worker.
    """

    def __init__(self, config: DictConfig) -> None:
        given = config.trainer.v1.get(MODE, {}) or {}
        self.settings = ATODSettings.read(dict(given))
        if self.settings.teacher and not config.actor_rollout_ref.actor.use_kl_loss:
            raise InvalidSettingError(
                "The teacher is scored by verl's reference worker, which verl starts only with "
                "actor_rollout_ref.actor.use_kl_loss=True; and kl_loss_coef=0.0."
            )
        with open_dict(config):
            # Where verl asks for the mode by name, it is the synchronous one.
            config.trainer.v1.trainer_mode = "sync"
            config.actor_rollout_ref.ref.atod_teacher = self.settings.teacher
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        import ray

        super()._init_resource_pool_mgr()
        for role in (Role.ActorRolloutRef, Role.RefPolicy):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(TeacherWorker)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Replace verl's advantages by the mix; rows of one session are one episode."""
        batch = super()._compute_advantage(batch, metrics)
        kappa, rho = self.settings.schedule.coefficients(self.global_steps)
        names = ["advantages", "response_mask"]
        if self.settings.teacher and kappa != 0.0:
            names += ["old_log_probs", "ref_log_prob"]
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = transfer_queue.kv_batch_get(**where, select_fields=names)
        rows = data.to_padded_tensor()
        # Keys are `{uid}_{session}_{row of the session}`.
        sessions = [key.rpartition("_")[0] for key in batch.keys]
        advantages, added = mixed_advantages(
            rows["advantages"],
            rows.get("old_log_probs"),
            rows.get("ref_log_prob"),
            rows["response_mask"].bool(),
            torch.from_numpy(np.unique(sessions, return_inverse=True)[1]),
            kappa=kappa,
            rho=rho,
            variant=self.settings.turn_weights,
            is_low_precision=True,  # the workers compute in bfloat16
        )
        metrics.update(added)
        nested = response_to_nested(advantages, data["response_mask"])
        output = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(batch))
        return transfer_queue.kv_batch_put(**where, fields=output)
