"""The settings of a run: frozen dataclasses, two levels, read from the command line by tyro."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import ParseProfile
from atod_gym.prompts import PROMPT_STYLES, PromptStyle

Method = Literal["atod", "opd", "grpo", "mix", "sod", "tcod", "sdar"]
Aggregation = Literal["token-mean", "trajectory-mean"]
Precision = Literal["auto", "float32", "bfloat16", "mixed"]
OptionValue = bool | int | float | str

VLLM_SHARE = 0.3
"""Share of a device's memory that vLLM gets where the setting has none."""


def parse_prompt_style(text: str) -> tuple[PromptStyle, int]:
    """Return the style that the setting `prompt_style` names, and how many past turns it shows.

    The number is of the window style; chat shows all turns.

    Raises:
        InvalidSettingError: there is no such style.
    """
    name, separator, number = text.partition(":")
    style = next((style for style in PROMPT_STYLES if style == name), None)
    is_number = name == "window" and number.isdecimal()
    if style is None or (separator and not is_number):
        raise InvalidSettingError(
            f"prompt_style must be chat, window, or window with a number of past turns (window:4), "
            f"not {text!r}."
        )
    return style, int(number or 2)


def parse_sampler(text: str) -> tuple[str, float]:
    """Return the engine that the setting `sampler` names, and its share of the device's memory.

    Raises:
        InvalidSettingError: there is no such engine, or a share is not between 0 and 1.
    """
    name, separator, number = text.partition(":")
    try:
        share = float(number) if separator else VLLM_SHARE
    except ValueError:
        share = 0.0
    if name not in ("plain", "vllm") or (name == "plain" and separator) or not 0 < share < 1:
        raise InvalidSettingError(
            "model.sampler must be plain, vllm, or vllm with a share of the device's memory "
            f"(vllm:0.4), not {text!r}."
        )
    return name, share


def is_url(model: str) -> bool:
    """Return whether a model is named by the URL of a server."""
    return model.startswith(("http://", "https://"))


@dataclass(frozen=True)
class EnvConfig:
    """Settings of tasks and prompts."""

    id: str = "atod/ALFWorld-v0"
    """Gymnasium id of the environment, whose actions are text; module:id imports a module first."""
    data: str = "auto"
    """Data of the environment: auto (official where it is found, else generated), official,
    generated, or a path."""
    options: dict[str, OptionValue] = field(default_factory=dict)
    """Further keyword arguments of gym.make, such as house_size tiny or products 100. Those of a
    preset (houses-tiny: house_size tiny; webshop-tiny: products 300; webshop: split_rule
    verl-agent; searchqa-tiny: entities 10000, topk 1, task_types one_hop) stay where they are not
    given."""
    max_turns: int = 30
    """Turn limit of an episode. Raise it for tasks that an expert needs longer for."""
    eval_splits: tuple[str, ...] = ("valid_seen", "valid_unseen")
    """Splits on which start, teacher and student are evaluated, every task of each. Empty: no
    evaluation."""
    eval_modes: tuple[str, ...] = ("greedy", "sampled")
    """Decoding of evaluations: greedy; sampled, at temperature 0.4; or sampled:0.7, at another. All
    are for start, teacher and last step; the first alone is for steps before, and chooses
    models/best."""
    eval_tasks: int = 0
    """Tasks of each split that are evaluated on, spread evenly over it; 0: all. Fewer widen
    intervals."""
    prompt_style: str = "chat"
    """chat: append-only dialogue, one sequence per trajectory; window: one row per turn, with the
    last two turns in one message; window:4: the last four. Use it where episodes outgrow the
    context."""
    template_options: dict[str, OptionValue] = field(default_factory=dict)
    """Variables for the chat template of a language model, such as enable_thinking False, which the
    presets of published runs have."""
    show_admissible: bool = False
    """Whether prompts list the admissible actions. Use it for models that do not know the task's
    actions; prompts become longer."""
    parse_profile: ParseProfile = "plain"
    """Parsing of completions. plain: the completion is the action; tags: <think>, <action>;
    react: lines of Thought: and Action:; compat: published rules. Use tags or react for language
    models that reason before they act."""
    invalid_action_penalty: float = 0.01
    """Subtracted from the reward of a turn whose completion does not parse, where success is worth
    1 (published: a hundredth of it). 0: such a turn costs nothing beyond itself."""


@dataclass(frozen=True)
class ModelConfig:
    """Student and teacher."""

    student: str = "tiny"
    """A shape (mini, tiny, small) that is trained from scratch on demonstrations; or a folder or
    hub name of a causal language model; or smollm2, whose weights are a Python package. The presets
    of published runs have none."""
    teacher: str = "small"
    """As student; or the URL of a server that scores tokens, such as http://10.0.0.2:8000. Its
    vocabulary must be the student's."""
    device: tuple[str, ...] = ("auto",)
    """The torch device, such as cpu or cuda:1. auto: a GPU if there is one. Two: the student's and
    the teacher's, such as cuda:0 cuda:1, where both do not fit on one GPU."""
    sampler: str = "plain"
    """Engine that samples the student's completions, in rollouts and evaluations. plain:
    transformers; vllm: vLLM in this process, with a share of 0.3 of the device's memory; vllm:0.4:
    another share. Use it where rollouts take most of a step."""
    dtype: Precision = "auto"
    """Precision. auto: float32, on a GPU mixed. mixed: float32 weights, while the layers run in
    bfloat16 and the teacher's weights are bfloat16; also fast on processors with AMX. bfloat16 is
    for adapters: it would round small updates of all weights away."""
    lora_rank: int = 0
    """Rank of the student's adapters (LoRA), which are then trained instead of its weights, scaled
    by 2. 0 trains all weights. Use 16 where the optimiser's state does not fit."""
    gradient_checkpointing: bool = False
    """Compute the student's layers again in the backward pass: less memory, a third more time."""
    max_context: int = 2048
    """Longest sequence in tokens, at most the model's positions. An episode that would outgrow it
    ends there. Less needs less memory in rollouts."""

    @property
    def devices(self) -> tuple[str, str]:
        """The devices of student and teacher."""
        return self.device[0], self.device[-1]


@dataclass(frozen=True)
class StartConfig:
    """Supervised training of student and teacher on expert episodes, before the run."""

    demonstrations: int = 1000
    """Expert episodes that are played; those that fail are left out. More help until the tasks of
    the training split repeat."""
    epochs: tuple[float, float] = (0.0, 0.0)
    """Passes of student and teacher over the demonstrations; fractions are allowed. 0: a loaded
    model stays as it is. Models made from scratch (mini, tiny, small) need more than 0. On the
    command line a loaded model has 0 unless this is given; all its weights are then trained."""
    lr: tuple[float, float] = (3e-3, 1.8e-2)
    """Highest learning rates: of embeddings and norms (AdamW), and of the matrices inside the
    layers (Muon). 0 for Muon: AdamW trains all weights; choose that, and 1e-5 to 3e-5, for language
    models."""
    observation_weight: float = 0.3
    """Loss weight of observation tokens (expert tokens: 1). Predicting observations teaches a
    from-scratch model to copy entity names. Use less for longer observations, 0 for language
    models."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The method and its constants; defaults are the paper's."""

    method: Method = "atod"
    """atod: annealed mix with turn weights; opd: teacher alone; grpo: reward alone; mix: both at 1;
    sod, tcod, sdar: published variants of distillation (see algorithm/methods.py)."""
    kappa: tuple[float, float] = (1.0, 0.1)
    """Coefficient of the teacher's term, first and last (atod). A last value of 0 withdraws the
    teacher, which helped with teachers near the student; it is not scored any more."""
    rho: tuple[float, float] = (1.0, 2.0)
    """Coefficient of the reward's term, first and last (atod). A larger last value follows the
    reward more once the teacher has been imitated."""
    opd_signal: str = "sampled"
    """The teacher's term. sampled: log-ratio of the sampled token (the paper); exact: reverse KL
    over the vocabulary; top-k:64: over the student's 64 most likely tokens and the rest as one. The
    last two need a teacher in this process and have less variance."""
    schedule: str = "linear:80"
    """Course of kappa and rho (atod). linear:80, cosine:80: from the first to the last values in 80
    steps; about half of train.steps is the paper's. constant: the first values stay. adaptive: no
    length; it advances with the share of groups in which a trajectory succeeds. gap: kappa falls
    from its first value to 0 as the student's training success nears the teacher's, which plays a
    step's tasks before the run; gap:0.62 gives that success. handoff:40: the teacher's term alone
    for 40 steps, then the reward's alone; handoff: until their disagreement stops falling."""
    turn_weights: str = "soft_or"
    """Weights of the teacher's term. soft_or: T-DUR (the paper); uniform: none; disagreement,
    uncertainty: one of its parts; token: per token; top:0.5: the highest half of the turns;
    smooth:0.3: drawn towards 1 by 0.3; mean_preserving: rescaled to a mean of 1."""
    advantage_over: Literal["trajectories", "turns"] = "trajectories"
    """Rows over which the returns of a group are normalised. turns: all turn rows, as in the
    released code, so that long trajectories count more."""
    clip: tuple[float, float, float] = (0.2, 0.2, 3.0)
    """Bounds of the ratio, [1 - clip[0], 1 + clip[1]], and the dual clip, which limits the loss
    where the advantage is negative (above 1; inf: none)."""
    aggregation: Aggregation = "token-mean"
    """Mean of the token losses: over all tokens (as published), or over trajectories of their
    means, where long trajectories weigh no more than short ones."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy, nats. The released code has 0.001; more keeps exploration up."""


@dataclass(frozen=True)
class TrainConfig:
    """Budget, optimiser and bookkeeping."""

    steps: int = 100
    """Optimiser cycles: rollout, scores, advantages, updates. The schedule has a length of its own
    (algorithm.schedule). A finished run continues with more."""
    tasks_per_step: int = 16
    """Tasks that are played in a step, each by a group of episodes (published: 16)."""
    group_size: int = 8
    """Episodes of each task in a step, whose returns are compared (published: 8). At least 2 for
    methods with a reward term; more find rare successes and take longer."""
    minibatches: str = "4"
    """Optimiser updates per step, each on a part of the trajectories. 1: on-policy throughout.
    rows:256: as many as give each about 256 turn rows (published)."""
    lr: float = 5e-4
    """Learning rate of AdamW. The default is for tiny models made from scratch; use 1e-6 for
    language models, 1e-5 to 1e-4 for adapters."""
    lr_warmup: float = 0.0
    """Share of train.steps over which the learning rate rises linearly from 0; then it is constant
    (published in Search-QA: 0.1). Use it where the first updates are too large."""
    max_completion_tokens: int = 16
    """Longest completion of a turn in tokens. A cut action is invalid: a line reports when most are
    cut. Use 512 and more for models that reason."""
    tokens_per_microbatch: int = 0
    """Padded tokens that go through a model at once. 0: 2048 on a processor, up to 16384 on a GPU,
    by its memory. It changes memory and speed alone: use less where memory runs out."""
    eval_every: int = 20
    """Steps between evaluations of the student; 0: only after the last step. The best of them is
    saved as models/best."""
    save_every: int = 20
    """Steps between checkpoints, of which two are kept; evaluated steps are saved, too. A run that
    is killed loses the steps since the last; one that is stopped or fails loses none."""
    seed: int = 0
    """Seed of tasks, sampling and minibatches. The start does not depend on it, so runs that differ
    in it alone are replicates."""


SECTIONS = ("env", "model", "start", "algorithm", "train")
"""Of the settings, in the order of `RunConfig`."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; config.json in its folder."""

    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def with_seed(self, seed: int) -> RunConfig:
        """Return the same settings with another seed."""
        return replace(self, train=replace(self.train, seed=seed))
