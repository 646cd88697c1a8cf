"""What goes together in a network, and its removal.

    network ──watch──▶ ids ──settle──▶ groups of units ──plan──▶ units that go ──cut──▶ smaller network ──▶
    proof

`watching` sees a network run, `rules` say what each operation does with ids, `ids` knows which are the same;
`units` makes groups of them. `planning` decides how many units go, `choosing` which, `costs` what that saves;
`trials` and `proof` see to it that it is right; `cutting` takes them out. What is left is repaired by
`compensating`: `matching` finds what was kept, `following` sees what readers give out, `reading` has them as
products of matrices; `reconstructing` chooses units by what such a repair would lose. `nesting` hides units
while a network trains, so that it can be cut at many widths.
"""
