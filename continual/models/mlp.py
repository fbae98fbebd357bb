"""A multi-layer perceptron that gives features: rows of any shape, flattened, through hidden layers.

Letters: B rows, I inputs of a row, D features.
"""

from __future__ import annotations

from torch import Tensor, nn

from continual.errors import ModelError
from continual.models.spec import Activation
from continual.table import Batch

ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Linear layers, each followed by its activation and dropout; no output layer, which is the head's.

    Weights begin as ``torch.nn.Linear`` draws them.

    Args:
        inputs: I, numbers in one row.
        hidden: width of each hidden layer; with none the features are the inputs.
        activation: after every layer.
        dropout: probability, after every activation.
    """

    def __init__(
        self, inputs: int, hidden: tuple[int, ...] = (256, 256), activation: Activation = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = inputs
        for size in hidden:
            layers += [nn.Linear(width, size), ACTIVATIONS[activation]()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        self.layers = nn.Sequential(*layers)
        self.inputs, self.feature_size = inputs, width

    def forward(self, batch: Batch) -> Tensor:
        """Features float32 (B, D) of ``batch["inputs"]`` (B, ...).

        Raises:
            ModelError: the batch has no ``inputs``, or rows of another size.
        """
        if "inputs" not in batch:
            raise ModelError(
                "an mlp reads the column 'inputs', which these rows do not have: use a pretrained model for text."
            )
        inputs_BI = batch["inputs"].flatten(1).float()
        if inputs_BI.shape[1] != self.inputs:
            raise ModelError(
                f"the rows have {inputs_BI.shape[1]} inputs and the mlp takes {self.inputs}: give it rows of one size."
            )
        features_BD: Tensor = self.layers(inputs_BI)
        return features_BD
