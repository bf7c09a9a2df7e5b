"""Crops in an index of faiss; a vector database takes the same arrays. Needs `pip install faiss-cpu`.

    python index.py WEIGHTS GALLERY QUERY

WEIGHTS: as of tracker.py. GALLERY, QUERY: folders of images.
"""

import sys
from pathlib import Path

import faiss

import mgn

model = mgn.load(sys.argv[1])
gallery, query = (sorted(path for path in Path(folder).rglob('*.*') if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
                  for folder in sys.argv[2:])

index = faiss.IndexFlatIP(model.dim)          # features are normalised: products are cosines
index.add(model.embed(gallery).numpy())
similarities, numbers = index.search(model.embed(query).numpy(), min(10, len(gallery)))
for path, row, indices in zip(query, similarities, numbers):
    print(path, *(f'{similarity:8.4f}  {gallery[i]}' for similarity, i in zip(row, indices)), sep='\n')
