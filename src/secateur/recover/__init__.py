"""Training a pruned model back, pruning while a network is trained, and what it learned.

    recover      training by us: distillation, checkpoints, one process or many; all weights, norms, or low-rank updates
    reconstruct  block by block what the dense model gives there, without labels
    Schedule     zeros that come, and move, during your own training
    penalties    sparse training before the cut
    generalise   train and test gap, calibration, noise
"""

from secateur.recover.blocks import Reconstructed as Reconstructed
from secateur.recover.blocks import Reconstruction as Reconstruction
from secateur.recover.blocks import reconstruct as reconstruct
from secateur.recover.callbacks import lightning_callback as lightning_callback
from secateur.recover.callbacks import trainer_callback as trainer_callback
from secateur.recover.generalise import Generalisation as Generalisation
from secateur.recover.generalise import Quality as Quality
from secateur.recover.generalise import generalisation as generalisation
from secateur.recover.generalise import interval as interval
from secateur.recover.generalise import noisy as noisy
from secateur.recover.generalise import paired as paired
from secateur.recover.generalise import quality_of as quality_of
from secateur.recover.gradual import Gradual as Gradual
from secateur.recover.loop import Recovered as Recovered
from secateur.recover.loop import recover as recover
from secateur.recover.penalties import Growth as Growth
from secateur.recover.penalties import bn_l1 as bn_l1
from secateur.recover.penalties import group_lasso as group_lasso
from secateur.recover.penalties import growing as growing
from secateur.recover.rewind import Snapshot as Snapshot
from secateur.recover.rewind import rewind as rewind
from secateur.recover.schedule import Schedule as Schedule
from secateur.recover.soft_threshold import soft_threshold as soft_threshold
from secateur.recover.training import Training as Training
