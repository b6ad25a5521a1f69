"""The recorded dialogues, and what plays them; README.md says what a case holds.

cases      a case as a value, read from its file
stage      a qmail home, with stand-ins for qmail-queue and checkpassword that keep records
transport  connections: a socketpair, two pipes, TCP
client     the client's end of a dialogue: octets out, replies in, in clear or under TLS
program    a run of the program on a stage
words      what varies from run to run, replaced by a word
play       a case, taken through a client
planned    a case without a process: the core with the effects that the case plans
"""
