"""The filters of ``mc2 curate filter`` by the names under which ``--filter`` finds them, such as
``mc2_hpc.filters.Size``. Those of captions alone can be used in ``mc2 curate match`` too.

=================  =======================================  ==========================================
filter             drops                                    needs
=================  =======================================  ==========================================
Length, Pattern    captions, by length and expressions
Languages, Words   captions, by language and lists of words
Size, Aspect       images, by their sides
=================  =======================================  ==========================================
"""

from mc2_hpc.curation.filters import Length, Pattern
from mc2_hpc.filters.captions import Languages, Words
from mc2_hpc.filters.shape import Aspect, Size

__all__ = ["Aspect", "Languages", "Length", "Pattern", "Size", "Words"]
