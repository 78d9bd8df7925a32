"""The kinds of messages between the processes of a group, each with what follows it."""

ALIVE = "alive"  # for how many seconds the call under way has got nothing done, and its number
CALL = "call"  # its number, the method, and the packed arguments with what is not needed any more
ASK = "ask"  # a call's number: what came of it?
OUTCOME = "outcome"  # a call's number; the type and the text of its error, or "" and what it returned
FAILED = "failed"  # the same, not asked for
ABOUT = "about"  # what all processes must have alike
AGREED = "agreed"  # the leader's answer to that: "", or why not
LEAVING = "leaving"  # a follower was told to end, and asks the leader to end the group
BYE = "bye"  # the group ends: "", or why
