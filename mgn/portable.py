"""A network as files that run without this project: ONNX, and PyTorch's own format of torch.export.

Both take uint8 (B, 3, H, W) RGB images of the input size, any B, and give L2-normalised float32 features (B, D).
"""

import hashlib
import importlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import gin
import torch
import torch.nn.functional as F
from torch import nn

from mgn.data.augmentation import normalise
from mgn.features import hash_of_weights, load_for_features
from mgn.ops.errors import UserError
from mgn.runs.files import writing
from mgn.runs.log import logger
from mgn.weights import saved_values

OPSET, IR_VERSION = 18, 9    # what onnxruntime reads from version 1.16 on, of 2023
BATCHES = (1, 2, 17)         # that each file is tried with
TOLERANCE = {'float32': 1e-5, 'float16': 1e-3}  # of cosine distances to PyTorch's float32 features


class Portable(nn.Module):
    """uint8 images → normalised features, in one graph."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images):
        return F.normalize(self.model(normalise(images).to(self.dtype)).features.float())


@gin.configurable(denylist=['checkpoint'])
def export_checkpoint(checkpoint, weights: str | None = gin.REQUIRED, output_dir: str | None = None,
                      precision: Literal['float32', 'float16'] = 'float32') -> None:
    """Writes model.onnx and model.pt2 into output_dir (None: the working folder), once each gives the right features.

    precision: of weights and arithmetic. Metadata, as JSON in the files: input size, D, precision, hash of the weights,
    options of MGN, and the data set and mAP that a checkpoint carries.
    Raises UserError where the extra `export` is not installed, or features differ; FileError where nothing can be
    written. A file that was there before is replaced only by one that was tried.
    """
    extra('onnx', 'onnxscript', 'onnxruntime')
    output_dir = output_dir or os.getcwd()
    model, extractor = load_for_features(checkpoint, weights, 'cpu', flip_test=False, precision='float32')
    images = torch.randint(0, 256, (max(BATCHES), 3, *extractor.input_size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    expected = extractor.forward(model, images)
    metadata = json.dumps({
        'input_size': list(extractor.input_size), 'D': model.feature_dim, 'precision': precision,
        'weights': hash_of_weights(model), 'mAP': checkpoint.get('mAP'), **model.architecture,
        'dataset': str(saved_values(checkpoint.get('config', ''), weights).get('dataset'))})
    network = Portable(model, getattr(torch, precision)).eval()
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim('B')},), strict=False)
    onnx = onnx_content(program, images, metadata)  # first: a signal during its imports would leave the folder behind
    with writing(output_dir, 'Free disk space or bind another output_dir.'):
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.export', dir=output_dir) as folder:
            paths = [os.path.join(folder, name) for name in ('model.onnx', 'model.pt2')]
            Path(paths[0]).write_bytes(onnx)
            torch.export.save(program, paths[1], extra_files={'mgn.json': metadata})
            for path, read in zip(paths, (read_onnx, read_pt2)):
                run, name = read(path)[0], os.path.basename(path)
                for size in BATCHES:
                    distance = (run(images[:size]) - expected[:size]).square().sum(1).max().item() / 2
                    if not distance <= TOLERANCE[precision]:
                        raise UserError(f'{name} gives features at a cosine distance of {distance:.2g} from those of '
                                        f'PyTorch; nothing was written. Export in another precision, or report this')
                logger.info('%s: %.1f MB', os.path.join(output_dir, name), os.path.getsize(path) / 1e6)
            for path in paths:
                os.replace(path, os.path.join(output_dir, os.path.basename(path)))


def extra(*names):
    """The last of these modules of the extra `export`."""
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        raise UserError(f'ONNX needs {error.name}, which is missing; pip install onnx onnxscript onnxruntime') from None


def onnx_content(program, images, metadata):
    """The bytes of an ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter about itself
        made = torch.onnx.export(program, (images,), dynamo=True, opset_version=OPSET, input_names=['images'],
                                 output_names=['features'], external_data=False, verbose=False)
    made.model.ir_version = IR_VERSION
    made.model.metadata_props.update(mgn=metadata, sha256='0' * 64)
    return sealed(made.model_proto.SerializeToString())


def sealed(content):
    """The bytes of an ONNX file with the right property sha256: their hash with zeros in its place."""
    place = rb'(?<=sha256\x12@)[0-9a-f]{64}'
    digest = hashlib.sha256(re.sub(place, b'0' * 64, content)).hexdigest()
    return re.sub(place, digest.encode(), content)


def read_onnx(path):
    """(uint8 images → features, metadata) of a file of export_checkpoint. UserError where it is something else."""
    runtime = extra('onnxruntime')
    try:
        content = Path(path).expanduser().read_bytes()
        session = runtime.InferenceSession(content, providers=['CPUExecutionProvider'])
        metadata = json.loads(session.get_modelmeta().custom_metadata_map['mgn'])
        taken, given = session.get_inputs()[0], session.get_outputs()[0]
        if [taken.name, taken.type, *taken.shape[1:], *given.shape[1:]] != [
                'images', 'tensor(uint8)', 3, *metadata['input_size'], metadata['D']]:
            raise ValueError('its network is not the one of its metadata')
        if b'sha256\x12@' not in content or content != sealed(content):
            raise ValueError('it is damaged: its bytes are not those of its checksum')
    except Exception as error:  # foreign bytes can raise nearly anything
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise UserError(f'{path} is no ONNX file of mgn.export ({reason:.200}). Give another file.') from None
    return lambda images: torch.from_numpy(session.run(None, {'images': images.contiguous().numpy()})[0]), metadata


def read_pt2(path):
    files = {'mgn.json': ''}
    module = torch.export.load(path, extra_files=files).module()
    return torch.no_grad()(module), json.loads(files['mgn.json'])
