"""Package layout that pyproject.toml cannot express.

The kernels are in the top-level folder ``kernels/ops`` but are imported as ``mc2_hpc.kernels``, because a top-level
package ``kernels`` would shadow Hugging Face's package of that name.
"""

from setuptools import find_packages, setup

kernel_packages = ["mc2_hpc.kernels", *(f"mc2_hpc.kernels.{name}" for name in find_packages("kernels/ops"))]

setup(
    packages=[*find_packages(include=["mc2_hpc", "mc2_hpc.*"]), "mc2_hpc.slurm_scripts", *kernel_packages],
    package_dir={"mc2_hpc.kernels": "kernels/ops", "mc2_hpc.slurm_scripts": "slurm"},
    package_data={
        "mc2_hpc": ["py.typed"],
        "mc2_hpc.metadata": ["languages.tsv"],
        "mc2_hpc.planning": ["*.yaml", "templates/*"],
        "mc2_hpc.slurm_scripts": ["*.sbatch", "*.sh"],
        **{
            f"mc2_hpc.{package}": ["templates/*"]
            for package in ("curation.report", "evaluation", "inspection", "pages", "quickstart")
        },
    },
)
