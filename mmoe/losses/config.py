"""Configures the losses of a run: the terms that every run has, and those that its recipe names by kind."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from mmoe.config.base import Config
from mmoe.config.registry import distinct
from mmoe.errors import ConfigError
from mmoe.losses.action import ActionLossConfig
from mmoe.losses.contrastive import ContrastiveConfig
from mmoe.losses.cross_entropy import CrossEntropyConfig
from mmoe.losses.router import RouterTerm
from mmoe.losses.term import LOSS_TERMS, LossTermConfig
from mmoe.losses.total import LossTerms
from mmoe.models.moe.balance import BalanceConfig, router_losses

ChosenTerms = Annotated[
    tuple[Annotated[SerializeAsAny[LossTermConfig], BeforeValidator(LOSS_TERMS)], ...], AfterValidator(distinct)
]


class LossConfig(Config):
    """Holds the weights and settings of all loss terms."""

    ce: CrossEntropyConfig = CrossEntropyConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    action: ActionLossConfig = ActionLossConfig()
    load_balance: BalanceConfig = BalanceConfig()
    z_loss: float = Field(default=0.001, ge=0)  # of the routers' z-loss
    terms: ChosenTerms = ()  # further ones, by kind

    @model_validator(mode="after")
    def _distinct(self) -> "LossConfig":
        try:
            self.build()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def build(self) -> LossTerms:
        """Build the terms. Raises ConfigError for two of one name."""
        weights = {f"balance_{level}": weight for level, weight in self.load_balance} | {"router_z": self.z_loss}
        routers = [RouterTerm(name, weights[name]) for name in router_losses(self.load_balance)]
        own = [self.ce.build(), self.contrastive.build(), self.action.build()]
        return LossTerms([*own, *routers, *(term.build() for term in self.terms)], self.load_balance)
