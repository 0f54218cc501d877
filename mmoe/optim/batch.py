"""Works out batch arithmetic: from the batch one wants to the accumulation and the number of steps it takes.

``GB_tok = mu_tok * A * D`` and ``steps = budget // GB_tok``; everything counts positions, padding included. GB_tok is
the global batch, mu_tok the micro-batch of one replica, A the accumulation, D the number of data replicas.
"""

from dataclasses import dataclass

from rich.table import Table

from mmoe.errors import ConfigError


@dataclass(frozen=True)
class BatchArithmetic:
    """Says what an optimizer step is: `accumulation` micro-batches of `micro_batch_sequences` on each of `replicas`."""

    sequence_length: int
    micro_batch_sequences: int
    accumulation: int  # A
    replicas: int  # D
    budget_positions: int

    @classmethod
    def from_config(
        cls,
        *,
        sequence_length: int,
        micro_batch_sequences: int | None,
        global_batch_positions: int,
        budget_positions: int,
        replicas: int,
    ) -> "BatchArithmetic":
        """Derive the accumulation A, or the micro-batch mu_tok where `micro_batch_sequences` is None.

        It then is all of a replica's share of the batch, and A = 1.

        Raises ConfigError when mu_tok * D does not divide GB_tok, or the budget is below it.
        """
        unit = sequence_length * (micro_batch_sequences or 1) * replicas
        times, rest = divmod(global_batch_positions, unit)
        if rest:
            nearest = f"{times * unit} or {(times + 1) * unit}" if times else f"{unit}"
            what, factor, key = "sequence", "", "the number of replicas"
            if micro_batch_sequences is not None:
                key = "training.micro_batch_sequences"
                what, factor = "micro-batch", f" x {micro_batch_sequences} {key}"
            raise ConfigError(
                f"training.global_batch_positions {global_batch_positions} is not a multiple of {unit}, the "
                f"positions of one {what} on every replica ({sequence_length} data.sequence_length{factor} x "
                f"{replicas} data replicas); set it to {nearest}, or change {key}"
            )
        if budget_positions < global_batch_positions:
            raise ConfigError(
                f"training.budget_positions {budget_positions} is less than one step (training."
                f"global_batch_positions {global_batch_positions}); raise the budget or shrink the batch"
            )
        if micro_batch_sequences is None:
            return cls(sequence_length, times, 1, replicas, budget_positions)
        return cls(sequence_length, micro_batch_sequences, times, replicas, budget_positions)

    @property
    def micro_batch_positions(self) -> int:
        """The positions of a micro-batch of one replica, mu_tok."""
        return self.sequence_length * self.micro_batch_sequences

    @property
    def global_batch_positions(self) -> int:
        """The positions of one optimizer step, GB_tok."""
        return self.micro_batch_positions * self.accumulation * self.replicas

    @property
    def sequences(self) -> int:
        """The number of sequences of one optimizer step."""
        return self.micro_batch_sequences * self.accumulation * self.replicas

    @property
    def iterations(self) -> int:
        """The number of optimizer steps of the budget; what is left over for no whole step is not trained."""
        return self.budget_positions // self.global_batch_positions

    def table(self) -> Table:
        """Make the table of the factors with their formulas, to be printed at the start of a run."""
        table = Table("batch", "value", "from", title_justify="left")
        table.columns[1].justify = "right"
        mu, size = self.micro_batch_positions, self.global_batch_positions
        rows = {
            "mu_tok": (mu, f"{self.micro_batch_sequences} sequences x {self.sequence_length} positions"),
            "A, accumulation": (self.accumulation, "GB_tok / (mu_tok x D)"),
            "D, data replicas": (self.replicas, "processes / (TP x PP x CP)"),
            "GB_tok": (size, f"{mu} x {self.accumulation} x {self.replicas}, {self.sequences} sequences"),
            "steps": (self.iterations, f"{self.budget_positions:,} positions // GB_tok"),
        }
        for name, (value, formula) in rows.items():
            table.add_row(name, f"{value:,}", formula)
        return table
