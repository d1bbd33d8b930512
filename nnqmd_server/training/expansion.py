"""The configuration of nequip's trainer that a training configuration of ours stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnqmd_server.training.config import Optimization, TrainingConfig
from nnqmd_server.units import GPA

SCORE = "val0_epoch/weighted_sum"
"""The validation score that chooses the packaged epoch, in nequip's name."""


def expand(
    config: TrainingConfig, epochs: int, statistics: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Expand to nequip's own (Hydra) configuration; file names are relative to the run directory.

    ``statistics`` are those of the data of a backbone, instead of those of these data.
    """
    opt = config.training
    each = opt.batch_size // config.processes
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": each, "num_workers": 0}
    return {
        "run": ["train"],
        "data": {
            "_target_": "nnqmd_server.training.kept_frames.FramesModule",
            "seed": opt.seed,
            "train_dataset": _frames(config, "train.xyz"),
            "val_dataset": _frames(config, "val.xyz"),
            "test_dataset": _frames(config, "test.xyz"),
            "train_dataloader": {**loader, "shuffle": True},
            "val_dataloader": loader,
            "test_dataloader": loader,
            "stats_manager": {
                "_target_": "nequip.data.CommonDataStatisticsManager",
                "dataloader_kwargs": {"batch_size": opt.batch_size},
                "type_names": list(config.elements),
            },
        },
        "trainer": _trainer(config, epochs),
        "training_module": _training_module(config, epochs, statistics or {}),
    }


def _frames(config: TrainingConfig, file: str) -> dict[str, Any]:
    return {
        "_target_": "nnqmd_server.training.kept_frames.KeptFrames",
        "file_path": file,
        "ase_args": {"format": "extxyz"},
        **({"include_keys": ["wannier_centroid"]} if config.wannier else {}),
        "transforms": [
            {
                "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                "model_type_names": list(config.elements),
            },
            {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": config.network.cutoff},
        ],
    }


def _trainer(config: TrainingConfig, epochs: int) -> dict[str, Any]:
    callbacks = [
        {
            "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
            "monitor": SCORE,
            "dirpath": ".",
            "filename": "best",
            "enable_version_counter": False,
        },
        {
            # `save_last` of the other one would keep the last epoch that was the best, not the last epoch
            "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
            "dirpath": ".",
            "filename": "last",
            "enable_version_counter": False,
            "every_n_epochs": 1,
            "save_on_train_epoch_end": True,
        },
        {"_target_": "nnqmd_server.training.progress.EpochLog", "path": "epochs.csv"},
    ]
    if config.training.patience is not None:
        callbacks.append(
            {
                "_target_": "lightning.pytorch.callbacks.EarlyStopping",
                "monitor": SCORE,
                "patience": config.training.patience,
            }
        )
    tensorboard = {
        "_target_": "lightning.pytorch.loggers.TensorBoardLogger",
        "save_dir": ".",
        "name": "tensorboard",
        "version": "",
    }
    strategy = {"strategy": {"_target_": "nequip.train.SimpleDDPStrategy"}} if config.processes > 1 else {}
    return {
        "_target_": "lightning.Trainer",
        "accelerator": config.device,
        "devices": config.processes,
        **strategy,
        "max_epochs": epochs,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "gradient_clip_val": config.training.gradient_clip,
        "logger": tensorboard if config.tensorboard else False,
        "callbacks": callbacks,
    }


def _schedule(opt: Optimization, epochs: int) -> dict[str, Any]:
    lowest = opt.learning_rate / 100
    if opt.schedule == "plateau":
        scheduler = {
            "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
            "factor": 0.5,
            "patience": 20,
            "min_lr": lowest,
        }
        return {"scheduler": scheduler, "monitor": SCORE, "interval": "epoch", "frequency": 1}
    scheduler = (
        {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "T_max": epochs,
            "eta_min": lowest,
        }
        if opt.schedule == "cosine"
        else {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0}
    )
    return {"scheduler": scheduler, "interval": "epoch", "frequency": 1}


def _training_module(config: TrainingConfig, epochs: int, statistics: Mapping[str, Any]) -> dict[str, Any]:
    opt = config.training
    validation = {"_target_": "nequip.train.MetricsManager", "metrics": _validation_metrics(config)}
    kind = "nnqmd_server.training.sam.EMASAMLightningModule"
    frozen = {}
    if config.start:
        kind, frozen = "nnqmd_server.training.frozen.StartedModule", {"backbone": "backbone.pt"}
    if config.wannier and config.wannier.backbone:
        kind, frozen = "nnqmd_server.training.frozen.FrozenBackboneModule", {"backbone": "backbone.pt"}
    return {
        "_target_": kind,
        **frozen,
        "rho": opt.rho,
        "adaptive": opt.adaptive,
        "sam_start_epoch": opt.sam_start_epoch,
        "sam_every": opt.sam_every,
        "cpu_matmul": True,
        "ema_decay": opt.ema_decay,
        "loss": {"_target_": "nequip.train.MetricsManager", "metrics": _loss_terms(config)},
        "val_metrics": validation,
        "test_metrics": validation,
        # Loss terms are tiny in eV, and so are the gradients: Adam's usual eps would slow the last epochs.
        "optimizer": {"_target_": "torch.optim.Adam", "lr": opt.learning_rate, "eps": 1e-12},
        "lr_scheduler": _schedule(opt, epochs),
        "model": _model(config) | statistics,
    }


def _model(config: TrainingConfig) -> dict[str, Any]:
    net, width = config.network, config.network.hidden_width
    model: dict[str, Any] = {
        "_target_": "allegro.model.AllegroModel",
        "seed": config.training.seed,
        "compile_mode": "compile" if config.training.compile else "eager",
        "model_dtype": net.precision,
        "type_names": list(config.elements),
        "r_max": net.cutoff,
        "radial_chemical_embed": {
            "_target_": "allegro.nn.TwoBodyBesselScalarEmbed",
            "num_bessels": net.n_bessel,
            "bessel_trainable": False,
            "polynomial_cutoff_p": 6,
        },
        "radial_chemical_embed_dim": net.scalar_features,
        "scalar_embed_mlp_hidden_layers_depth": 1,
        "scalar_embed_mlp_hidden_layers_width": width,
        "l_max": net.l_max,
        "parity": True,
        "num_layers": net.layers,
        "num_scalar_features": net.scalar_features,
        "num_tensor_features": net.tensor_features,
        "allegro_mlp_hidden_layers_depth": 1,
        "allegro_mlp_hidden_layers_width": width,
        "tp_path_channel_coupling": True,
        "readout_mlp_hidden_layers_depth": 1,
        "readout_mlp_hidden_layers_width": width,
        "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
        "per_type_energy_shifts": "${training_data_stats:per_atom_energy_mean}",
        "per_type_energy_scales": "${training_data_stats:forces_rms}",
    }
    if config.wannier:
        model |= {
            "_target_": "nnqmd_server.networks.allegro_wannier.AllegroWannier",
            "carriers": dict(config.wannier.carriers),
            "ion_charges": dict(config.wannier.ion_charges),
            "wannier_hidden_width": config.wannier.hidden_width,
        }
    return model


def _fields(config: TrainingConfig) -> list[tuple[str, Any, float]]:
    """Name, nequip field and aimed error [eV, Angstrom] of every trained quantity."""
    aims = config.loss
    trained: list[tuple[str, Any, float]] = [
        ("energy", {"_target_": "nequip.data.PerAtomModifier", "field": "total_energy"}, aims.energy * 1e-3),
        ("forces", "forces", aims.forces * 1e-3),
        ("stress", "stress", aims.stress * GPA),
    ]
    if config.wannier:
        centroid = ("wannier_centroid", "wannier_centroid", aims.wannier_centroid)
        # On a frozen backbone nothing else can change.
        trained = [centroid] if config.wannier.backbone else [*trained, centroid]
    return trained


def _loss_terms(config: TrainingConfig) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{name}_mse",
            "field": quantity,
            "coeff": aim**-2,
            **(
                {
                    "metric": {"_target_": "nnqmd_server.training.loss.PartialMeanSquaredError"},
                    "ignore_nan": True,
                }
                if name == "wannier_centroid"
                else {"metric": {"_target_": "nequip.train.MeanSquaredError"}}
            ),
        }
        for name, quantity, aim in _fields(config)
    ]


def _validation_metrics(config: TrainingConfig) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{name}_rmse",
            "field": quantity,
            "coeff": 1 / aim,
            "metric": {"_target_": "nequip.train.RootMeanSquaredError"},
            **({"ignore_nan": True} if name == "wannier_centroid" else {}),
        }
        for name, quantity, aim in _fields(config)
    ]
