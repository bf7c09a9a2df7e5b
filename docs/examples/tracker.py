"""An appearance model for a tracker: boxes in a frame → features, whose products are cosine similarities.

    python tracker.py WEIGHTS IMAGE

WEIGHTS: a checkpoint, a file of fast-reid's MGN, or an .onnx file of mgn.export.
"""

import sys

import numpy as np
from PIL import Image

import mgn


class Appearance:
    def __init__(self, weights):
        self.model = mgn.load(weights)

    def __call__(self, frame, boxes):
        """frame: (H, W, 3) uint8, BGR as OpenCV gives it; boxes: n rows x1, y1, x2, y2 in pixels → (n, D) float32."""
        height, width = frame.shape[:2]
        crops = []
        for x1, y1, x2, y2 in np.asarray(boxes).astype(int).tolist():
            x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)  # detectors' boxes leave the frame
            crops.append(frame[y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)])
        return self.model.embed(crops, bgr=True).numpy()


if __name__ == '__main__':
    frame = np.array(Image.open(sys.argv[2]).convert('RGB'))[..., ::-1]  # what cv2.imread gives
    height, width = frame.shape[:2]
    features = Appearance(sys.argv[1])(frame, [(0, 0, width, height), (-5, -5, width / 2, height + 9)])
    print(features.shape, 'similarity', round(float(features[0] @ features[1]), 4))
