"""Every form in which a spectrum leaves: read back, it says the same numbers, units and formulas."""

import base64
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import ase.io
import h5py
import numpy as np
import pytest
from spectra_cases import H, harmonic_velocities

from nnqmd_server.errors import DataError, InputError, NnqmdError, OutputError
from nnqmd_server.spectra.dielectric import dielectric_constant
from nnqmd_server.spectra.dipole_files import Dipoles
from nnqmd_server.spectra.inelastic import neutron_spectrum
from nnqmd_server.spectra.infrared import infrared_spectrum
from nnqmd_server.spectra.instruments import direct
from nnqmd_server.spectra.output import oclimax
from nnqmd_server.spectra.output.contents_dos import dos_result
from nnqmd_server.spectra.output.contents_ins import ins_result
from nnqmd_server.spectra.output.contents_ir import ir_result
from nnqmd_server.spectra.output.experiment import fitted_scale, read_experiment, with_experiment
from nnqmd_server.spectra.output.files import whole_file
from nnqmd_server.spectra.output.labelled import Labelled, Quantity, Result, find_block, to_scipp
from nnqmd_server.spectra.output.nexus import read_nexus, write_nexus
from nnqmd_server.spectra.output.report import write_report
from nnqmd_server.spectra.output.save import save
from nnqmd_server.spectra.qe_map import map_of
from nnqmd_server.spectra.trajectory import Velocities
from nnqmd_server.spectra.vibrations import densities_of_states
from nnqmd_server.units import MEV_PER_INVCM

N = 14.00674
KELVIN = 100.0


@pytest.fixture(scope="module")
def vibrations():
    """Hydrogen at 100 and 150 meV and nitrogen at 25 meV, 2 ps every fs, in several blocks."""
    rng = np.random.default_rng(3)
    hydrogen = harmonic_velocities(rng.choice([0.100, 0.150], 12), H, KELVIN, 2001, 1.0, seed=1)
    nitrogen = harmonic_velocities(np.full(4, 0.025), N, KELVIN, 2001, 1.0, seed=2)
    velocities = np.concatenate([hydrogen, nitrogen], axis=1)
    symbols = ("H",) * 12 + ("N",) * 4
    return densities_of_states(
        Velocities(symbols, velocities, np.arange(2001), 1.0, "v_centroid"), KELVIN, 300.0
    )


@pytest.fixture(scope="module")
def spectrum(vibrations):
    return neutron_spectrum(vibrations, solid=True, highest=2000.0)


@pytest.fixture(scope="module")
def ins(spectrum):
    return ins_result(spectrum, ["a <note> & more", "second"], map_of(spectrum))


@pytest.fixture(scope="module")
def chopper(vibrations):
    """Direct geometry, two groups."""
    spectrum = neutron_spectrum(vibrations, highest=2000.0, instrument=direct("SEQUOIA", 150.0, 4.0))
    return ins_result(spectrum, (), map_of(spectrum))


@pytest.fixture(scope="module")
def dos(vibrations):
    return dos_result(vibrations, None, 2000.0, ["a note"])


@pytest.fixture(scope="module")
def saved(ins, dos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "made" / "here"
    save(dos, folder)
    save(ins, folder)
    return folder


def quantities(result):
    return {
        f"{data.name}/{q.name}": q
        for data in result.data
        for q in (*data.axes, *data.coordinates, *data.curves)
    }


# --- NeXus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ins", "dos"])
def test_nexus_read_back_is_the_same(kind, ins, dos, saved):
    result = {"ins": ins, "dos": dos}[kind]
    back = read_nexus(saved / f"{kind}.nxs")
    assert [d.name for d in back.data] == [d.name for d in result.data]
    mine, found = quantities(result), quantities(back)
    assert list(found) == list(mine)
    for name, q in mine.items():
        f = found[name]
        assert (f.name, f.unit, f.title, f.formula) == (q.name, q.unit, q.title, q.formula)
        np.testing.assert_array_equal(f.values, q.values)
        assert (f.error is None) == (q.error is None)
        if q.error is not None:
            np.testing.assert_array_equal(f.error, q.error)
    for part in ("kind", "title", "formulas", "tables", "notes"):
        assert getattr(back, part) == getattr(result, part)
    assert dict(back.settings) == dict(result.settings)
    assert dict(back.constants) == dict(result.constants)


def test_some_quantities_have_errors(dos):
    assert all(c.error is not None and (c.error >= 0).all() for c in dos.data[0].curves)


def test_nexus_file_follows_the_standard(saved):
    """Default chain, axes that fit, units on every field, errors beside their signal."""
    with h5py.File(saved / "ins.nxs") as file:
        assert file.attrs["NX_class"] == "NXroot"
        entry = file[file.attrs["default"]]
        assert entry.attrs["NX_class"] == "NXentry"
        assert entry[entry.attrs["default"]].attrs["NX_class"] == "NXdata"
        groups = [g for g in entry.values() if g.attrs.get("NX_class") == "NXdata"]
        assert len(groups) == 2
        for data in groups:
            signal = data[data.attrs["signal"]]
            axes = [data[name] for name in np.atleast_1d(data.attrs["axes"])]
            assert signal.shape == tuple(len(a) for a in axes)
            for name, axis in zip(np.atleast_1d(data.attrs["axes"]), axes, strict=True):
                assert signal.shape[data.attrs[f"{name}_indices"]] == len(axis)
            for name in data.attrs.get("auxiliary_signals", ()):
                assert data[name].shape == signal.shape
            for name, field in data.items():
                if name != "title":
                    assert "units" in field.attrs
                    assert field.attrs["long_name"]
                if name.endswith("_errors"):
                    assert field.shape == data[name.removesuffix("_errors")].shape


@pytest.mark.peer
def test_nexus_file_in_nexusformat(ins, saved):
    nexusformat = pytest.importorskip("nexusformat.nexus")
    root = nexusformat.nxload(str(saved / "ins.nxs"))
    data = root.get_default()
    np.testing.assert_array_equal(data.nxsignal.nxvalue, ins.data[0].curves[0].values)
    np.testing.assert_array_equal(data.nxaxes[0].nxvalue, ins.data[0].axes[0].values)
    assert data.nxaxes[0].units == "1/cm"
    assert data.nxsignal.units == "barn/(sr*meV)"
    vdos = nexusformat.nxload(str(saved / "dos.nxs"))["entry/dos/vdos"]
    errors = nexusformat.nxload(str(saved / "dos.nxs")).get_default().nxerrors
    assert errors.shape == vdos.shape


@pytest.mark.peer
def test_nexus_file_in_silx(ins, saved):
    nxdata = pytest.importorskip("silx.io.nxdata")
    silx_io = pytest.importorskip("silx.io")
    with silx_io.open(str(saved / "ins.nxs")) as file:
        found = nxdata.get_default(file)
        assert found.is_valid
        np.testing.assert_array_equal(found.signal[()], ins.data[0].curves[0].values)
        assert list(found.auxiliary_signals_dataset_names) == [c.name for c in ins.data[0].curves[1:]]
        assert nxdata.NXdata(file["entry/map"]).is_valid


@pytest.mark.peer
def test_nexus_file_in_scippnexus(dos, saved):
    scippnexus = pytest.importorskip("scippnexus")
    with scippnexus.File(saved / "dos.nxs") as file:
        found = file["entry/dos"][...]
    curve = dos.data[0]["vdos_H"]
    assert str(found.coords["energy"].unit) == "1/cm"
    np.testing.assert_array_equal(found["vdos_H"].values, curve.values)
    np.testing.assert_allclose(found["vdos_H"].variances, curve.error**2)


def test_not_one_of_our_files(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_nexus(tmp_path / "nothing.nxs")
    (tmp_path / "text.nxs").write_text("hello")
    with pytest.raises(DataError, match="not a spectrum of nnqmd"):
        read_nexus(tmp_path / "text.nxs")
    with h5py.File(tmp_path / "other.nxs", "w") as file:
        file.create_group("entry/nnqmd").attrs["format"] = "nnqmd spectrum 99"
    with pytest.raises(DataError, match="99"):
        read_nexus(tmp_path / "other.nxs")


def test_scipp_arrays_have_units_coordinates_and_variances(ins, dos):
    scipp = pytest.importorskip("scipp")
    group = to_scipp(ins)
    data = group["ins"]
    assert data["total_backward"].unit == scipp.Unit("barn/(sr*meV)")
    assert data.coords["energy"].unit == scipp.Unit("1/cm")
    meV = (data.coords["energy"] * scipp.scalar(1.0) * _planck_c(scipp)).to(unit="meV")
    np.testing.assert_allclose(meV.values, data.coords["energy_meV"].values, rtol=1e-8)
    assert group["map"]["intensity"].dims == ("Q", "energy_transfer")
    curve = dos.data[0]["vdos_H"]
    np.testing.assert_allclose(to_scipp(dos)["dos"]["vdos_H"].variances, curve.error**2)


def _planck_c(scipp):
    from scipy import constants

    return scipp.scalar(constants.h * constants.c, unit="J*m")


def test_every_unit_is_one_that_scipp_knows(ins, dos):
    scipp = pytest.importorskip("scipp")
    for result in (ins, dos):
        for q in quantities(result).values():
            scipp.Unit(q.unit or "one")
        for constant in result.constants.values():
            scipp.Unit(constant.unit or "one")


# --- columns -----------------------------------------------------------------------------------------

FUNCTIONS = {name: getattr(np, name) for name in ("sqrt", "exp", "cos", "sin", "radians", "abs")}


def read_table(path):
    """Columns, constants and formulas of a table, from the text alone."""
    header = [line[2:] for line in path.read_text().splitlines() if line.startswith("#")]
    constants, formulas = {}, {}
    for line in header:
        if match := re.fullmatch(r"  (\w+) = (\S+) \[\S+\] .*", line):
            constants[match[1]] = float(match[2])
        if match := re.fullmatch(r" +\d+ (\w+) \[(\S+)\](?: = (.*?))?; .*", line):
            formulas[match[1]] = match[3]
    columns = dict(zip(header[-1].split(), np.loadtxt(path).T, strict=True))
    assert list(formulas) == list(columns)
    return columns, constants, formulas


def test_direct_geometry(chopper, tmp_path):
    save(chopper, tmp_path)
    columns, constants, formulas = read_table(tmp_path / "ins.txt")
    assert constants["Ei"] == pytest.approx(150 / MEV_PER_INVCM)
    for name in ("Q_low", "Q_high", "total_3_60deg"):
        value = eval(formulas[name], {"__builtins__": {}}, FUNCTIONS | constants | columns)
        np.testing.assert_allclose(value, columns[name], rtol=3e-7, atol=1e-9)
    inside = columns["Q_rms"]
    assert ((inside > columns["Q_low"]) & (inside < columns["Q_high"])).all()
    assert not (tmp_path / "ins.csv").exists()
    assert (tmp_path / "ins-map.png").stat().st_size > 30_000
    back = read_nexus(tmp_path / "ins.nxs")
    np.testing.assert_array_equal(back.data[0]["Q_rms"].values, chopper.data[0]["Q_rms"].values)


@pytest.mark.parametrize("kind", ["ins", "dos"])
def test_formulas_in_the_header_give_the_columns(kind, saved):
    columns, constants, formulas = read_table(saved / f"{kind}.txt")
    checked = 0
    for name, formula in formulas.items():
        if formula:
            value = eval(formula, {"__builtins__": {}}, FUNCTIONS | constants | columns)
            np.testing.assert_allclose(
                value, columns[name], rtol=3e-7, atol=1e-7 * np.abs(columns[name]).max()
            )
            checked += 1
    assert checked >= 3


def test_columns_are_the_arrays(dos, saved):
    columns, constants, _ = read_table(saved / "dos.txt")
    data = dos.data[0]
    for q in (*data.axes, *data.coordinates, *data.curves):
        np.testing.assert_allclose(columns[q.name], q.values, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(columns["gdos_error"], data["gdos"].error, rtol=1e-7)
    assert constants["sigma_H"] == pytest.approx(82.02)
    assert "note: a note" in (saved / "dos.txt").read_text()


def test_gdos_weighs_with_sigma_over_mass(dos):
    data = dos.data[0]
    h, n = 12 * 82.02 / H, 4 * 11.51 / N
    expected = (h * data["vdos_H"].values + n * data["vdos_N"].values) / (h + n)
    np.testing.assert_allclose(data["gdos"].values, expected, rtol=1e-9)


def test_infrared_table_can_be_computed_again_from_its_text(tmp_path):
    """<J.J>, window and constants of the files, put into the printed formula, give the spectrum."""
    rng = np.random.default_rng(5)
    walk = np.cumsum(rng.normal(0, 0.01, (3000, 2, 3)), axis=0)
    t = 0.5 * np.arange(3000)[:, None, None]
    dipoles = Dipoles(walk + 0.3 * np.cos(0.3 * t), np.tile(10 * np.eye(3), (3000, 1, 1)), 0.5)
    spectrum = infrared_spectrum(dipoles, 250.0, 300.0, highest=3000.0)
    result = ir_result(spectrum, [], dielectric_constant(dipoles, 250.0), "x")
    save(result, tmp_path, ["txt", "nxs"], pictures=False)
    columns, c, _ = read_table(tmp_path / "ir.txt")
    acf, _, _ = read_table(tmp_path / "ir-correlation.txt")
    text = (tmp_path / "ir.txt").read_text()
    assert (
        "2 A dt {Sum_k window_k current_acf_k cos(w time_k) - window_0 current_acf_0 / 2} / attenuation"
        in text
    )
    w = columns["wavenumber"] * c["w_per_invcm"]
    C = acf["window"] * acf["current_acf"]
    integral = np.cos(w[:, None] * acf["time"]) @ C - C[0] / 2
    attenuation = np.sinc(w * c["dt"] / 2 / np.pi) ** 2
    found = 2 * c["A"] * c["dt"] * integral / attenuation
    np.testing.assert_allclose(found, columns["n_alpha"], rtol=1e-5, atol=1e-6 * found.max())
    # A by hand, in SI
    from scipy import constants

    V, e = 1000e-30, constants.e
    A = 1 / (6 * constants.epsilon_0 * constants.c * V * constants.k * 250.0)  # s^-1... per (C m)^2/s
    assert c["A"] == pytest.approx(A * (e * 1e-10) ** 2 / 1e-15 / 100, rel=1e-9)
    eps = dielectric_constant(dipoles, 250.0)
    assert f"{eps.value:.4g}" in text


# --- the Q-E map -------------------------------------------------------------------------------------


def test_map_integrates_to_the_cross_section(ins):
    """Int S dE = 1 for every atom at small Q, where no intensity lies beyond the map's last energy."""
    data = ins["map"]
    Q, energy = (axis.values for axis in data.axes)
    # energy gain is cut off at zero, and half of the elastic line: leave both out by starting at 40 cm^-1,
    # and compare with the first-order sum Q^2 Int g_1 of hydrogen and nitrogen at that side
    small = Q < 0.35
    area = data.curves[0].values[np.ix_(small, energy > 40)].sum(axis=1) * 4 * MEV_PER_INVCM
    r = 2.09013 * Q[small] ** 2
    hydrogen = 12 / 16 * 82.02 / (4 * np.pi) * r / H * np.mean(1 / np.array(_levels()))
    assert area == pytest.approx(hydrogen + _nitrogen(r), rel=0.03)


def _levels():
    rng = np.random.default_rng(3)
    return 1e3 * rng.choice([0.100, 0.150], 12)


def _nitrogen(r):
    boltzmann = np.exp(-25 / (0.0861733 * KELVIN))
    return 4 / 16 * 11.51 / (4 * np.pi) * r / N / 25 / (1 - boltzmann)


def test_map_on_the_kinematic_line_is_the_isotropic_spectrum(vibrations):
    isotropic = neutron_spectrum(vibrations, solid=True, anisotropic=False, highest=2000.0)
    scattering = map_of(isotropic)
    from scipy.interpolate import RegularGridInterpolator

    on_line = RegularGridInterpolator((scattering.Q, scattering.energy), scattering.intensity, method="cubic")
    energy = np.arange(100.0, 1900.0, 4.0)
    Q = np.interp(energy, isotropic.energy, isotropic.Q[0])
    total = np.interp(energy, isotropic.energy, isotropic.total[0])
    # the map broadens with the sigma of the energy shown, the spectrum with that of the true one
    assert on_line(np.column_stack([Q, energy])) == pytest.approx(total, rel=0.03, abs=0.01 * total.max())


# --- OCLIMAX -----------------------------------------------------------------------------------------


def test_oclimax_columns(ins, saved):
    lines = (saved / "ins.csv").read_text().splitlines()
    assert lines[3].replace(" ", "") == "#deltaE,Total-backward,Total-forward,[backward0-10-20-30-4+]"
    assert [int(x) for x in lines[2].strip(" #").split(",")] == [0, 0, 100, 0, 0]
    table = np.loadtxt(saved / "ins.csv", delimiter=",", skiprows=4)
    data = ins.data[0]
    shown = data.axes[0].values > 0
    assert table.shape == (shown.sum(), 7)
    np.testing.assert_allclose(table[:, 0], data.axes[0].values[shown], rtol=1e-6)
    for n in range(1, 5):
        np.testing.assert_allclose(table[:, 2 + n], data[f"order{n}_backward"].values[shown], rtol=1e-5)
    np.testing.assert_allclose(table[:, 1], table[:, 3:].sum(axis=1), rtol=1e-5)
    forward = data["total_forward"].values - data["order0_forward"].values
    np.testing.assert_allclose(table[:, 2], forward[shown], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0.00266907, "0.266907E-02"),
        (8.0, "0.800000E+01"),
        (0.0, "0.000000E+00"),
        (9.9999999, "0.100000E+02"),
        (-25.0, "-0.250000E+02"),
        (1e-20, "0.100000E-19"),
        (1e-120, "0.000000E+00"),
    ],
)
def test_fortran_numbers(number, written):
    assert oclimax._fortran(number) == written


def test_oclimax_needs_its_two_banks(dos, tmp_path):
    with pytest.raises(DataError, match="backward and a forward"):
        oclimax.write_oclimax(tmp_path / "x.csv", dos)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cell", [np.diag([5.0, 6.0, 7.0]), [[5, 0.3, 0.2], [1.0, 6, -0.4], [-2.0, 0.7, 7]]])
def test_velocity_dump_read_by_ase(cell, tmp_path):
    cell = np.array(cell, float)
    rng = np.random.default_rng(0)
    velocities = rng.normal(0, 0.01, (3, 4, 3))
    symbols = ("O", "H", "H", "O")
    frames = [(10 * k, v, cell) for k, v in enumerate(velocities)]
    assert oclimax.write_velocity_dump(tmp_path / "velocity.dump", symbols, frames) == 3
    text = (tmp_path / "velocity.dump").read_text()
    # ASE asks for positions: give it some
    text = text.replace("vx vy vz", "vx vy vz x y z")
    text = re.sub(r"^(\d+ \d+ [A-Z].*)$", r"\1 0 0 0", text, flags=re.MULTILINE)
    (tmp_path / "with.dump").write_text(text)
    found = ase.io.read(tmp_path / "with.dump", ":", format="lammps-dump-text", units="real")
    assert [a.get_chemical_symbols() for a in found] == [list(symbols)] * 3
    for atoms, v in zip(found, velocities, strict=True):
        read = atoms.get_velocities()
        from ase import units

        # the same lengths and angles, also with the cell, however it is turned
        np.testing.assert_allclose(read * units.fs @ (read * units.fs).T, v @ v.T, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(read * units.fs @ np.array(atoms.cell).T, v @ cell.T, rtol=1e-6, atol=1e-9)


def test_a_left_handed_cell_is_refused(tmp_path):
    cell = np.diag([5.0, 5.0, -5.0])
    with pytest.raises(DataError, match="left-handed"):
        oclimax.write_velocity_dump(tmp_path / "v.dump", ("H",), [(0, np.zeros((1, 3)), cell)])
    assert not list(tmp_path.iterdir())


# --- whole files -------------------------------------------------------------------------------------


def test_nothing_partial_stays(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["table.txt"]


def test_a_folder_that_cannot_be_written(ins, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        save(ins, tmp_path / "file" / "folder")
    with pytest.raises(OutputError, match="cannot be written"):
        write_nexus(tmp_path / "not there" / "ins.nxs", ins)


def test_a_full_disk(ins, tmp_path, monkeypatch):
    (tmp_path / "ins.nxs").write_text("from before")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(OutputError, match="No space left"):
        write_nexus(tmp_path / "ins.nxs", ins)
    monkeypatch.undo()

    def fail(*arguments, **options):
        raise RuntimeError("Unable to synchronously write data\nand a long tale")

    monkeypatch.setattr(h5py.Group, "create_dataset", fail)
    with pytest.raises(OutputError, match="Unable to synchronously write data"):
        write_nexus(tmp_path / "ins.nxs", ins)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("ins.nxs", "from before")]


def test_a_picture_that_fails_leaves_no_half_file(ins, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OutputError, match="No space left"):
        save(ins, tmp_path, ["txt"])
    assert [p.name for p in tmp_path.iterdir()] == ["ins.txt"]


def test_unknown_format(ins, tmp_path):
    with pytest.raises(InputError, match="'xls'"):
        save(ins, tmp_path, ["xls"])


# --- pictures and report -----------------------------------------------------------------------------


def test_pictures(saved):
    for name in ("ins", "ins-elements", "ins-map", "dos"):
        png = (saved / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 30_000
        svg = (saved / f"{name}.svg").read_text()
        assert svg.rstrip().endswith("</svg>")
    assert not [p.name for p in saved.iterdir() if "partial" in p.name]


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.images, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        assert tag not in {"script", "link", "iframe", "object"}
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "srcset", "poster", "data", "action"}:
                (self.images if tag == "img" else self.found).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_file_that_asks_nothing_of_the_network(ins, saved):
    text = write_report(saved).read_text()
    links = Links()
    links.feed(text)
    assert not links.open
    assert set(links.found) == {"#ins", "#dos"}
    assert len(links.images) == 4
    for image in links.images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    without_pictures = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", without_pictures)
    assert "a &lt;note&gt; &amp; more" in without_pictures
    for formula in ins.formulas[:3]:
        assert formula.replace("<", "&lt;").replace(">", "&gt;") in without_pictures
    assert "82.02" in without_pictures and "numpy" in without_pictures


def test_report_leaves_out_pictures_of_an_earlier_result(ins, saved, tmp_path):
    picture = (saved / "ins-map.png").read_bytes()
    save(ins, tmp_path, pictures=False)
    made = (tmp_path / "ins.nxs").stat().st_mtime
    for name, time in (("ins-map.png", made - 1), ("ins-elements.png", made + 1)):
        (tmp_path / name).write_bytes(picture)
        os.utime(tmp_path / name, (time, time))
    text = write_report(tmp_path).read_text()
    assert "ins-elements.png" in text
    assert "ins-map.png" not in text


def test_report_on_nothing(tmp_path):
    with pytest.raises(DataError, match="holds no spectrum"):
        write_report(tmp_path)


# --- beside an experiment ----------------------------------------------------------------------------


def measured(path, ins, factor, header="# E(meV) I err", noise=0.0, errors=True):
    data = ins.data[0]
    energy = data.axes[0].values[data.axes[0].values > 20][::3]
    intensity = factor * np.interp(energy, data.axes[0].values, data.curves[0].values)
    intensity += noise * np.random.default_rng(0).normal(size=len(energy))
    rows = [energy * MEV_PER_INVCM if "meV" in header else energy, intensity]
    if errors:
        rows.append(np.full(len(energy), max(noise, 0.01 * factor)))
    np.savetxt(path, np.array(rows).T, header=header, comments="")
    return path


@pytest.mark.parametrize("header", ["# E(meV) I err", "wavenumber (cm-1), intensity", "# X (1/cm)\n0"])
def test_scale_of_an_experiment_is_found(ins, tmp_path, header):
    path = measured(tmp_path / "measured.dat", ins, 7.3, header)
    result = with_experiment(ins, read_experiment(path))
    block = find_block(result, "experiment")
    assert block.curves[0].unit == "barn/(sr*meV)"
    main = ins.data[0].curves[0].values
    scaled = np.interp(block.axes[0].values, ins.data[0].axes[0].values, main)
    np.testing.assert_allclose(block.curves[0].values, scaled, rtol=1e-6, atol=1e-9)
    assert "0.136986" in result.settings["experiment"]


def test_scale_weighs_with_the_errors(ins, tmp_path):
    path = measured(tmp_path / "measured.dat", ins, 1.0)
    experiment = read_experiment(path)
    wild = experiment.energy > 1000
    bent = replace(
        experiment,
        intensity=np.where(wild, 50.0, experiment.intensity),
        error=np.where(wild, 1e9, experiment.error),
    )
    data = ins.data[0]
    factor = fitted_scale(bent, data.axes[0].values, data.curves[0].values, 30, 2000)
    assert factor == pytest.approx(1.0, rel=1e-4)


def test_an_experiment_that_does_not_say_its_unit(ins, tmp_path):
    path = measured(tmp_path / "measured.dat", ins, 1.0, "# X Y E", errors=False)
    with pytest.raises(DataError, match="meV or cm") as caught:
        read_experiment(path)
    assert "--experiment-unit" in caught.value.fix
    in_cm = read_experiment(path, "cm^-1").energy
    np.testing.assert_allclose(read_experiment(path, "meV").energy * MEV_PER_INVCM, in_cm)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# meV\n" + "1 2\n" * 5, "5 rows"),
        ("# meV\n" + "1 2\n" * 20 + "3 4 5\n", "two numbers, others three"),
        ("# meV\n" + "1 2 0\n" * 20, "positive error"),
    ],
)
def test_unusable_experiments(text, message, tmp_path):
    (tmp_path / "bad.dat").write_text(text)
    with pytest.raises(DataError, match=message):
        read_experiment(tmp_path / "bad.dat")


def test_an_experiment_elsewhere(ins, tmp_path):
    (tmp_path / "far.dat").write_text("# meV\n" + "".join(f"{e} 1\n" for e in range(900, 950)))
    with pytest.raises(DataError, match="0 points between"):
        with_experiment(ins, read_experiment(tmp_path / "far.dat"))
    with pytest.raises(DataError, match="cannot be read"):
        read_experiment(tmp_path / "none.dat")


def test_picture_beside_an_experiment(ins, tmp_path):
    path = measured(tmp_path / "measured.dat", ins, 7.3, noise=0.01)
    written = save(with_experiment(ins, read_experiment(path)), tmp_path / "out")
    assert {"ins-experiment.png", "ins-experiment.svg", "ins-experiment.txt"} <= {p.name for p in written}
    assert "measured.dat" in (tmp_path / "out" / "report.html").read_text()


# --- the nouns ---------------------------------------------------------------------------------------


def test_shapes_must_fit():
    axis = Quantity("x", np.arange(3.0), "1/cm")
    with pytest.raises(ValueError, match="shape"):
        Labelled("a", "", (axis,), (Quantity("y", np.arange(4.0), ""),))
    with pytest.raises(ValueError, match="shape"):
        Labelled("a", "", (axis,), (Quantity("y", np.arange(3.0), "", error=np.arange(2.0)),))


def test_names_that_are_not_there(ins):
    with pytest.raises(KeyError):
        ins["nothing"]
    with pytest.raises(KeyError):
        ins.data[0]["nothing"]
    with pytest.raises(DataError, match=r"no 'nothing'"):
        find_block(ins, "nothing")
    assert "map" in ins
    assert issubclass(DataError, NnqmdError)
    assert isinstance(ins, Result)


def test_the_public_surface_is_there_and_light():
    import subprocess
    import sys

    from nnqmd_server import spectra

    for name in spectra.__all__:
        assert getattr(spectra, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        spectra.nothing  # noqa: B018
    script = (
        "import sys, nnqmd_server.cli.spectrum, nnqmd_server.spectra as s;"
        "heavy = {'torch', 'matplotlib', 'scipy', 'h5py', 'ase', 'scipp'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
