"""The configuration that is in force, as `zimage serve` would read it."""

import os
from dataclasses import dataclass
from typing import TypeVar

from services.diffusion.settings import DiffusionSettings
from services.encoder.settings import EncoderSettings
from services.gateway.settings import GatewaySettings
from services.rewriter.settings import BackEndKind, RewriterSettings
from services.vl.settings import VlSettings
from shared.settings import CONFIG_FILE, DEFAULT_PROFILE, PROFILE, InvalidSettings, ServiceSettings
from zimage.doctor.row import Row, missing, ok
from zimage.flags import check_configuration
from zimage.plan import (
    DIFFUSION,
    ENCODER,
    GATEWAY,
    REWRITER,
    VL,
    CannotStart,
    rewriter_back_end,
    runs_diffusion,
    runs_encoder,
)

WHAT = "configuration"
S = TypeVar("S", bound=ServiceSettings)


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings of every service."""

    gateway: GatewaySettings
    encoder: EncoderSettings
    diffusion: DiffusionSettings
    rewriter: RewriterSettings
    vl: VlSettings

    @property
    def runs_encoder(self) -> bool:
        """Whether the encoder runs on this machine."""
        return runs_encoder(self.gateway)

    @property
    def runs_diffusion(self) -> bool:
        """Whether the diffusion service runs on this machine."""
        return runs_diffusion(self.gateway)

    @property
    def loads_second_encoder(self) -> bool:
        """Whether the rewriter loads the text encoder's weights on this machine, too. Raises CannotStart."""
        writes = rewriter_back_end(self.gateway, self.rewriter)
        return writes is BackEndKind.LOCAL and self.rewriter.reads_model_directory


def read_configuration() -> tuple[Row, Configuration | None]:
    """The finding, and the configuration where it is valid."""
    try:
        settings = check_configuration()
    except InvalidSettings as error:
        return missing(WHAT, str(error), "correct it; `zimage config` shows what is in force"), None
    configuration = Configuration(
        _of(GatewaySettings, settings[GATEWAY]),
        _of(EncoderSettings, settings[ENCODER]),
        _of(DiffusionSettings, settings[DIFFUSION]),
        _of(RewriterSettings, settings[REWRITER]),
        _of(VlSettings, settings[VL]),
    )
    try:
        rewriter_back_end(configuration.gateway, configuration.rewriter)
    except CannotStart as error:
        return missing(WHAT, str(error), "correct it; `zimage config` shows what is in force"), None
    path = os.environ.get(CONFIG_FILE)
    source = f"profile {os.environ.get(PROFILE, DEFAULT_PROFILE)} of {path}" if path else "no file"
    return ok(WHAT, f"valid ({source})"), configuration


def _of(kind: type[S], settings: ServiceSettings) -> S:
    if not isinstance(settings, kind):
        raise TypeError(f"{kind.__name__} was expected")
    return settings
