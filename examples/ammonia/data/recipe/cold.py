"""Cold crystals of phase I to label: relaxed by the small model, strained, each molecule moved and turned a little.

python cold.py OUT.xyz       24 frames at lattice constants that are none of the five of ../../reference
"""
import sys
from pathlib import Path
import numpy as np
from ase.io import write
from scipy.spatial.transform import Rotation

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / 'reference'))
import quantities  # noqa: E402
from compare import model_evaluate  # noqa: E402

LATTICE = [4.88, 4.93, 4.98, 5.00, 5.04, 5.06, 5.10, 5.12, 5.16, 5.18, 5.23, 5.28]


def make(out):
    evaluate = model_evaluate(HERE.parents[1] / 'models/small/ammonia-small.nequip.zip')
    rng = np.random.default_rng(20261121)
    relaxed = quantities.phase1(evaluate, evaluate, LATTICE)
    frames = []
    for k in range(24):
        frame, level = relaxed[k % 12].copy(), [0.3, 1.0][k // 12]
        strain = rng.normal(0, 0.008 * level, (3, 3))
        strain = (strain + strain.T) / 2
        strain -= np.eye(3) * np.trace(strain) / 3
        s, a = np.eye(3) + strain, frame.cell[0, 0]
        pos = frame.positions.copy()
        for i in range(0, 16, 4):
            arm = pos[i:i + 4] - pos[i]
            arm -= np.round(arm / a) * a
            turn = Rotation.from_rotvec(rng.normal(0, 0.10 * level, 3)).as_matrix()
            pos[i:i + 4] = pos[i] @ s + rng.normal(0, 0.06 * level, 3) + arm @ turn.T + rng.normal(0, 0.02 * level, (4, 3))
        frame.positions, frame.cell = pos, frame.cell.array @ s
        lower, rotation = frame.cell.standard_form()
        frame.positions, frame.cell, frame.calc = frame.positions @ rotation.T, lower, None
        for name in set(frame.arrays) - {'numbers', 'positions'}:
            del frame.arrays[name]
        frame.info = {'config_type': 'solid16_cold', 'source_id': f'solid16_cold_a{LATTICE[k % 12] * 100:.0f}_f{k:06d}'}
        frames.append(frame)
    write(out, frames, format='extxyz', parallel=False)


if __name__ == '__main__':
    make(sys.argv[1])
