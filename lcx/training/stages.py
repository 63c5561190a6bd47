"""The stages of a run as the model sees them: each with its own RoPE base."""

from dataclasses import replace

from lcx.config import Config, ModelConfig
from lcx.mixers import find_mixer
from lcx.stages import Stage, stages


def model_stages(config: Config) -> tuple[Stage, ...]:
    """The stages of a run; the config of each has the stage's RoPE base in all mixers that turn by one."""

    def of(stage: Stage) -> Stage:
        if stage.rope_base is None:
            return stage
        return replace(stage, config=replace(stage.config, model=with_rope_base(stage.config.model, stage.rope_base)))

    return tuple(map(of, stages(config)))


def model_stage_at(config: Config, data_index: int) -> Stage:
    """The stage that a data index lies in."""
    return next(stage for stage in reversed(model_stages(config)) if stage.first_index <= data_index)


def with_rope_base(model: ModelConfig, base: float) -> ModelConfig:
    """The model with another base of its rotary positions; mixers without positions stay without."""
    mixers = {}
    for name, record in model.mixers.items():
        fields = find_mixer(record["type"], f"model.mixers.{name}.type").Options.__dataclass_fields__
        turns = "rope_base" in fields and record.get("rope_base", fields["rope_base"].default) is not None
        mixers[name] = dict(record) | ({"rope_base": base} if turns else {})
    return replace(model, mixers=mixers)
