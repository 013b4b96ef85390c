"""The networks of the InfoMCR paper, as functions that return `(inputs, outputs)`.

The outputs are logits. `keras.Model(*resnet_20())` and `RegularizedModel(*resnet_20())` both work.
Initialisation, weight decay and batch normalisation are those of the networks' own papers. All
functions take

    input_shape: Tuple `(height, width, channels)`.
    num_classes: Integer, the number of logits.
    l2: Float, the coefficient of the sum of squares of the decayed weights in the loss: half of
        the "weight decay" of papers and of torch. Each default is that of the network's paper.
"""

from networks.densenet import densenet_bc_100_12
from networks.plain_cnn import plain_cnn
from networks.resnet import resnet_20
from networks.wide_resnet import wrn_28_2, wrn_28_2_infomcr, wrn_28_10
from networks.wide_resnet_imagenet import wrn_18_1_5

NETWORKS = {
    "plain-cnn": plain_cnn,
    "resnet-20": resnet_20,
    "wrn-28-2": wrn_28_2,
    "wrn-28-2-infomcr": wrn_28_2_infomcr,
    "wrn-28-10": wrn_28_10,
    "densenet-bc-100-12": densenet_bc_100_12,
    "wrn-18-1.5": wrn_18_1_5,
}
