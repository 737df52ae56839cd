//! Where the serial port goes: a bounded backlog and its readers (stdio, file, pty, Unix socket).
