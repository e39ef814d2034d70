# The public names and where they are defined, for type checkers; __init__.py imports them late.
from bigbatch.noise.geometry import L2 as L2
from bigbatch.noise.geometry import SIGN as SIGN
from bigbatch.noise.geometry import SPECTRAL as SPECTRAL
from bigbatch.noise.geometry import Geometry as Geometry
from bigbatch.noise.geometry import by_group as by_group
from bigbatch.noise.geometry import preconditioned as preconditioned
from bigbatch.noise.in_loops import add as add
from bigbatch.noise.in_loops import average as average
from bigbatch.noise.in_loops import empty as empty
from bigbatch.noise.in_loops import measure as measure
from bigbatch.noise.in_loops import read as read
from bigbatch.noise.in_loops import start as start
from bigbatch.noise.in_loops import watching as watching
