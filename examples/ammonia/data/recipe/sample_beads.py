"""Ring-polymer beads to label: i-PI runs with the small model, and one bead of each step that is kept.

python sample_beads.py make FOLDER                    an i-PI input for every run in RUNS
nnqmd run FOLDER/NAME/input.xml --model ammonia-small.nequip.zip --out FOLDER/out/NAME --workers 1
python sample_beads.py pick FOLDER/out SEED OUT.xyz NAME...   structures, the runs interleaved
"""
import sys
from pathlib import Path
import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from ase.io import read, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
#  name: frame of ammonia_train.xyz to start from, T/K, beads, steps of 0.5 fs, seed, strain (symmetric, xx yy zz yz xz xy), steps between frames (50 if left out)
def to(a, b): return [b / a - 1] * 3 + [0, 0, 0]
S = {'a506': 'solid16_a506_T100_f000', 'a513': 'solid16_a513_T170_f000', 'a522': 'solid16_a522_T300_f000',
     'l693': 'liq32_L693_T250_f000', 'l705': 'liq32_L705_T400_f000'}
RUNS = {
    # labelled first
    'pi16_a506_T100': (S['a506'], 100, 16, 1200, 1114, to(5.06, 5.06), 100),
    'pi16_a498_T150': (S['a506'], 150, 16, 500, 1164, to(5.06, 4.98), 100),
    'pi16_a530_T250': (S['a522'], 250, 16, 500, 1264, to(5.22, 5.30), 100),
    'pi16_strain1_T200': (S['a513'], 200, 16, 500, 1217, [0.01000763732837336, -0.01598669720710197, 0.0237655543001637, 0.02779127455116113, -0.00876196020756927, 0.004896839638406696], 100),
    # labelled next; those not sampled with ammonia-small but with the first ammonia-base: a500, a510, a516, tetra, shear2, L720, L670
    'pi16_a513_T020': (S['a513'], 20, 16, 300, 201, to(5.13, 5.13)),
    'pi16_a504_T060': (S['a506'], 60, 16, 300, 202, to(5.06, 5.04)),
    'pi16_a516_T200': (S['a513'], 200, 16, 300, 203, to(5.13, 5.16)),
    'pi16_a522_T300': (S['a522'], 300, 16, 300, 204, to(5.22, 5.22)),
    'pi16_shear1_T100': (S['a513'], 100, 16, 300, 205, [0.00, 0.01, -0.01, 0.05, -0.02, 0.01]),
    'pi16_tetra_T150': (S['a513'], 150, 16, 300, 206, [0.04, -0.02, -0.02, 0, 0, 0]),
    'pi32_L693_T250': (S['l693'], 250, 16, 300, 207, to(6.93, 6.93)),
    'pi16_a480_T500': (S['a506'], 500, 8, 300, 208, to(5.06, 4.80)),       # close contacts
    'pi16_a500_T100': (S['a506'], 100, 16, 300, 209, to(5.06, 5.00)),
    'pi16_a510_T120': (S['a506'], 120, 16, 300, 210, to(5.06, 5.10)),
    'pi16_shear2_T300': (S['a513'], 300, 16, 300, 211, [-0.02, 0.03, 0.01, -0.03, 0.04, 0.02]),
    'pi32_L720_T400': (S['l705'], 400, 16, 300, 212, to(7.05, 7.20)),
    'pi16_a498_T020': (S['a506'], 20, 16, 300, 213, to(5.06, 4.98)),
    'pi32_L670_T500': (S['l693'], 500, 8, 300, 215, to(6.93, 6.70)),       # close contacts
}
INPUT = """<simulation verbosity='medium' safe_stride='100'>
  <output prefix='nh3'>
    <properties filename='out' stride='10'>[ step, time{{picosecond}}, temperature{{kelvin}}, potential{{electronvolt}} ]</properties>
    <trajectory filename='pos' stride='{stride}' format='xyz' cell_units='angstrom'> positions{{angstrom}} </trajectory>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>{seed}</seed></prng>
  <ffdirect name='allegro' threaded='False'>
    <pes>custom</pes> <pes_path>nnqmd_pes.py</pes_path> <batch_size>{beads}</batch_size>
    <parameters>{{template: init.xyz}}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>{T}</velocities>
    </initialize>
    <forces> <force forcefield='allegro'/> </forces>
    <ensemble> <temperature units='kelvin'>{T}</temperature> </ensemble>
    <motion mode='dynamics'> <dynamics mode='nvt'>
      <timestep units='femtosecond'>0.5</timestep>
      <thermostat mode='pile_g'> <tau units='femtosecond'>100</tau> <pile_lambda>1.0</pile_lambda> </thermostat>
    </dynamics> </motion>
  </system>
</simulation>
"""


def strained(atoms, voigt):
    """The cell and the molecules' positions are strained; the molecules themselves keep their shape."""
    xx, yy, zz, yz, xz, xy = voigt
    s = np.eye(3) + np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    pos = atoms.positions.copy()
    for k in range(0, len(atoms), 4):
        d = find_mic(pos[k:k + 4] - pos[k], atoms.cell)[0]
        pos[k:k + 4] = pos[k] @ s + d
    new = Atoms(atoms.numbers, pos, cell=atoms.cell.array @ s, pbc=True)
    # i-PI wants an upper triangular cell: this turns the whole crystal
    lower, turn = new.cell.standard_form()
    return Atoms(new.numbers, new.positions @ turn.T, cell=lower, pbc=True)


def make(folder):
    frames = {f.info['source_id']: f for f in read(HERE.parent / 'ammonia_train.xyz', ':', parallel=False)}
    for name, (start, T, beads, steps, seed, voigt, *stride) in RUNS.items():
        d = folder / name
        d.mkdir(parents=True, exist_ok=True)
        a = strained(frames[start], voigt)
        with open(d / 'init.xyz', 'w') as f:
            f.write(f"{len(a)}\n# CELL(abcABC): " + ' '.join(f'{x:.8f}' for x in a.cell.cellpar()) + " cell{angstrom} positions{angstrom}\n")
            for s, p in zip(a.get_chemical_symbols(), a.positions):
                f.write(f'{s:8s} {p[0]:.8f} {p[1]:.8f} {p[2]:.8f}\n')
        (d / 'input.xml').write_text(INPUT.format(T=T, beads=beads, steps=steps, seed=seed, stride=(stride or [50])[0]))
        (d / 'nnqmd_pes.py').write_text((ROOT / 'ipi_inputs/ammonia-solid-trpmd/nnqmd_pes.py').read_text())


def pick(root, seed, out, runs, skip=2):
    """One bead, drawn by chance, of every step that i-PI wrote after the first two; widely separated steps first."""
    from nnqmd_server.labels.structures import read_structures
    rng = np.random.default_rng(seed)
    todo = {}
    for run in runs:
        beads = [read_structures([f], skip=skip) for f in sorted((root / run).glob('nh3.pos_*.xyz'))]
        n = min(map(len, beads))
        chosen = [beads[int(rng.integers(len(beads)))][k] for k in range(n)]
        order, step = [], n
        while step:
            order += [i for i in range(0, n, step) if i not in order]
            step //= 2
        todo[run] = [chosen[i] for i in order]
    queue = []
    while any(todo.values()):
        queue += [todo[run].pop(0) for run in runs if todo[run]]
    write(out, queue, format='extxyz', parallel=False)


if __name__ == '__main__':
    if sys.argv[1] == 'make':
        make(Path(sys.argv[2]))
    else:
        pick(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
