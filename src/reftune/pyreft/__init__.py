"""pyreft's names over this library: ``import reftune.pyreft as pyreft`` and the script goes on.

What is different, and why: docs/migrating.md. Open `model.py` for `ReftModel`, `config.py` and `interventions.py` for
what it is made of, `locations.py` for `unit_locations`, `datasets.py` and `data_modules.py` for data, `trainers.py`
for trainers, `reading.py`, `importing.py` and `checkpoint.py` for saved models. It must not import `cli` or `runs`.
"""

from reftune.pyreft.collating import ReftDataCollator, ReftRewardCollator
from reftune.pyreft.config import ReftConfig, TaskType
from reftune.pyreft.data_modules import (
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
)
from reftune.pyreft.datasets import (
    ReftClassificationDataset,
    ReftDataset,
    ReftGenerationDataset,
    ReftPreferenceDataset,
    ReftRawDataset,
    ReftRewardDataset,
    ReftSupervisedDataset,
)
from reftune.pyreft.interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from reftune.pyreft.locations import get_intervention_locations, parse_positions
from reftune.pyreft.model import ReftModel, get_reft_model
from reftune.pyreft.trainers import (
    ReftTrainer,
    ReftTrainerForCausalLM,
    ReftTrainerForCausalLMDistributed,
    ReftTrainerForSequenceClassification,
)

__all__ = [
    # configuration
    "ReftConfig",
    "TaskType",
    # interventions
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    # model
    "ReftModel",
    "get_reft_model",
    # positions
    "get_intervention_locations",
    "parse_positions",
    # data
    "ReftClassificationDataset",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    # training
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
]
