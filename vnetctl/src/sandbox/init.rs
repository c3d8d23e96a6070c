//! The first process of a guest's PID namespace: it makes the guest's view of the file system and its
//! pty, starts the command, passes signals on, reaps, and exits with the command's status. All other
//! processes of the guest end with it (pid_namespaces(7)).

use std::ffi::{CString, OsString};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setpgid, setsid, tcsetpgrp};

use super::error::{Failure, Step};
use super::front::LinkKind;
use super::masks::Places;
use super::mounts::View;
use super::sockets::{Filtered, Outside, Watching};
use super::wire::{self, Reply};
use super::{EXIT_CANNOT_EXECUTE, EXIT_FAILED, EXIT_NOT_FOUND, caps, mounts, seccomp, sys};

/// What init needs; all of it comes from the helper.
pub(crate) struct Init {
    /// The program and its arguments.
    pub(crate) command: Vec<OsString>,
    /// Where it starts; `None` where that has no path any more, to stay there.
    pub(crate) cwd: Option<PathBuf>,
    /// What is hidden from it.
    pub(crate) places: Places,
    /// Vnet's own places, hidden all of them.
    pub(crate) own: Vec<PathBuf>,
    /// Vnet's own programs.
    pub(crate) programs: Vec<PathBuf>,
    /// Where alone it may write, if that is said.
    pub(crate) writable: Option<Vec<PathBuf>>,
    /// What was outside, the sockets that are opened to it among it.
    pub(crate) outside: Outside,
    /// To the thread that looks after its sockets.
    pub(crate) sockets: OwnedFd,
    /// Its resolver configuration.
    pub(crate) resolv_conf: String,
    /// Which standard streams are the pty.
    pub(crate) pty: [bool; 3],
    /// The other standard streams, in order.
    pub(crate) streams: Vec<OwnedFd>,
    /// To be handed to the front.
    pub(crate) link: OwnedFd,
    /// What the link is.
    pub(crate) kind: LinkKind,
    /// The guest's MAC address.
    pub(crate) mac: [u8; 6],
    /// What could not be had so far.
    pub(crate) notes: Vec<String>,
    /// To the front.
    pub(crate) control: OwnedFd,
    /// A byte says start; its end says that the helper is gone.
    pub(crate) gate: std::io::PipeReader,
}

impl Init {
    /// Never returns: ends with the exit code that the command had.
    pub(crate) fn run(mut self) -> ! {
        let code = match self.prepare() {
            Ok(terminal) => self.start_and_wait(terminal),
            Err(failure) => {
                let _ = wire::send(self.control.as_fd(), &Reply::Failed(failure), &[]);
                EXIT_FAILED
            }
        };
        // SAFETY: ends this forked process without running the exit handlers of the program it is.
        unsafe { libc::_exit(code.into()) }
    }

    /// Everything before the command; returns the pty's guest side.
    fn prepare(&mut self) -> Result<Option<OwnedFd>, Failure> {
        let mut notes = std::mem::take(&mut self.notes);
        notes.extend(mounts::set_up(&View {
            places: &self.places,
            own: &self.own,
            programs: &self.programs,
            opened: self.outside.opened(),
            writable: self.writable.as_deref(),
            resolv_conf: &self.resolv_conf,
            cwd: self.cwd.as_deref(),
        })?);
        // By path, again: the old one may lie beneath what was mounted since.
        if let Some(cwd) = &self.cwd {
            std::env::set_current_dir(cwd).step(format!("enter the directory {}", cwd.display()))?;
        }
        let pty = if self.pty.contains(&true) {
            Some(open_pty()?)
        } else {
            None
        };

        let ready = Reply::Ready {
            kind: self.kind,
            mac: self.mac,
            notes,
        };
        let mut fds: Vec<RawFd> = vec![self.link.as_raw_fd()];
        fds.extend(pty.as_ref().map(|(master, _)| master.as_raw_fd()));
        wire::send(self.control.as_fd(), &ready, &fds).step("tell the front that the guest is ready")?;
        // From here on the front alone holds the link and the pty's other side. The link is replaced
        // by something harmless, as it cannot be moved out of `self`.
        self.link = self.control.try_clone().step("close the guest's link")?;
        Ok(pty.map(|(_, terminal)| terminal))
    }

    /// Waits for the word, starts the command, and looks after it until it ends.
    fn start_and_wait(&mut self, terminal: Option<OwnedFd>) -> u8 {
        let started = match self.gate.read(&mut [0]) {
            // Held as long as init lives: the front must not take a pause in its use for its end.
            Ok(1) => self.start(terminal.as_ref()),
            _ => return EXIT_FAILED,
        };
        let outcome = started.and_then(|(child, signals)| match child {
            Started::Running(child) => self.look_after(child, &signals),
            Started::NotExecuted(errno) => Ok(self.not_executed(errno)),
            Started::NotConfined(errno) => Err(not_confined(errno)),
        });
        let reply = match outcome {
            Ok(reply) => reply,
            Err(failure) => Reply::Failed(failure),
        };
        let _ = wire::send(self.control.as_fd(), &reply, &[]);
        match reply {
            Reply::Exited { code, .. } | Reply::NotExecuted { code, .. } => code,
            _ => EXIT_FAILED,
        }
    }

    fn not_executed(&self, errno: Errno) -> Reply {
        let code = if errno == Errno::ENOENT {
            EXIT_NOT_FOUND
        } else {
            EXIT_CANNOT_EXECUTE
        };
        let name = self.command[0].to_string_lossy();
        Reply::NotExecuted {
            code,
            reason: format!("cannot execute {name:?}: {}", errno.desc()),
        }
    }

    fn start(&self, terminal: Option<&OwnedFd>) -> Result<(Started, SignalFd), Failure> {
        // A session of the guest's own, led by init: the command is a job in it, so that it can be
        // suspended, and has no other terminal than this one.
        setsid().step("start the guest's session")?;
        if let Some(terminal) = terminal {
            sys::set_controlling_terminal(terminal.as_fd()).step("give the guest's session its terminal")?;
        }
        // Init hears signals through a descriptor. Blocked ones reach the first process of a namespace.
        let all = SigSet::all();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None).step("block signals")?;
        let signals = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC).step("listen to signals")?;

        let program = self.c_command().step("pass on the command")?;
        let (mut failed, report) = std::io::pipe().step("make a pipe")?;
        // The command shares its user with init and must not be able to look into it.
        nix::sys::prctl::set_dumpable(false).step("hide init from the command")?;
        // SAFETY: the process has one thread, so the child may do whatever its parent may.
        let child = match unsafe { fork() }.step("fork the command")? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop(failed);
                let (at, errno) = match become_command(&program, self, terminal) {
                    Err(refused) => refused,
                    Ok(never) => match never {},
                };
                let mut report = report;
                let _ = report.write_all(&[at as i32, errno as i32].map(i32::to_ne_bytes).concat());
                // SAFETY: ends the child without running the exit handlers of the program it is.
                unsafe { libc::_exit(EXIT_FAILED.into()) }
            }
        };
        drop(report);
        let (mut at, mut errno) = ([0; 4], [0; 4]);
        // The pipe closes with the exec that succeeds.
        let told = failed
            .read_exact(&mut at)
            .and_then(|()| failed.read_exact(&mut errno));
        let errno = Errno::from_raw(i32::from_ne_bytes(errno));
        let started = match told {
            Ok(()) if i32::from_ne_bytes(at) == At::Confining as i32 => Started::NotConfined(errno),
            Ok(()) => Started::NotExecuted(errno),
            Err(_) => Started::Running(child),
        };
        Ok((started, signals))
    }

    fn c_command(&self) -> Result<Vec<CString>, std::ffi::NulError> {
        self.command
            .iter()
            .map(|argument| CString::new(argument.clone().into_vec()))
            .collect()
    }

    /// Passes signals on and reaps until the command ends.
    fn look_after(&self, child: Pid, signals: &SignalFd) -> Result<Reply, Failure> {
        loop {
            let Some(info) = signals.read_signal().step("hear a signal")? else {
                continue;
            };
            let signal = Signal::try_from(info.ssi_signo as i32).ok();
            match signal {
                Some(Signal::SIGCHLD) => {
                    if let Some(exited) = self.reap(child) {
                        return Ok(exited);
                    }
                }
                // Meant for one process.
                Some(signal @ (Signal::SIGTERM | Signal::SIGUSR1 | Signal::SIGUSR2)) => {
                    let _ = kill(child, signal);
                }
                // As from a terminal: to the whole job.
                Some(signal) => {
                    let _ = kill(Pid::from_raw(-child.as_raw()), signal);
                }
                None => {}
            }
        }
    }

    /// Takes note of every child that ended or stopped; tells when the command itself ended.
    fn reap(&self, child: Pid) -> Option<Reply> {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                    // An exit code has eight bits.
                    return Some(Reply::Exited {
                        code: code as u8,
                        signal: None,
                    });
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                    let signal = signal as i32;
                    return Some(Reply::Exited {
                        code: (128 + signal) as u8,
                        signal: Some(signal),
                    });
                }
                Ok(WaitStatus::Stopped(pid, signal)) if pid == child => {
                    let _ = wire::send(self.control.as_fd(), &Reply::Stopped(signal as i32), &[]);
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
    }
}

/// What became of the forked child.
enum Started {
    /// It is the command by now.
    Running(Pid),
    /// It could not become the command.
    NotExecuted(Errno),
    /// It could not be confined, so that it was not to become the command.
    NotConfined(Errno),
}

/// Where the forked child failed.
#[derive(Clone, Copy)]
enum At {
    /// Giving it its streams, or executing it.
    Executing = 1,
    /// Taking from it what it is not to have.
    Confining = 2,
}

/// Turns this freshly forked process into the command: its streams, its process group, nothing else.
fn become_command(
    command: &[CString],
    init: &Init,
    terminal: Option<&OwnedFd>,
) -> Result<std::convert::Infallible, (At, Errno)> {
    take_streams(init, terminal).map_err(|errno| (At::Executing, errno))?;
    confine(init).map_err(|errno| (At::Confining, errno))?;
    match nix::unistd::execvp(&command[0], command) {
        Err(errno) => Err((At::Executing, errno)),
        Ok(never) => match never {},
    }
}

fn take_streams(init: &Init, terminal: Option<&OwnedFd>) -> nix::Result<()> {
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    if let Some(terminal) = terminal {
        // From the background that would stop us, were signals not blocked.
        tcsetpgrp(terminal, nix::unistd::getpid())?;
    }
    let mut others = init.streams.iter();
    for (number, from_pty) in (0..).zip(init.pty) {
        let stream = if from_pty { terminal } else { others.next() }.ok_or(Errno::EBADF)?;
        // SAFETY: replaces a standard stream, which nothing in this process owns as an `OwnedFd`.
        Errno::result(unsafe { libc::dup2(stream.as_raw_fd(), number) })?;
    }
    sys::reset_signals()
}

fn confine(init: &Init) -> nix::Result<()> {
    caps::drop_all()?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let network = nix::fcntl::open("/proc/self/ns/net", flags, Mode::empty())?;
    let listener = seccomp::confine()?;
    // From here on calls that are looked at wait for whoever has the listener.
    let channel = init.sockets.as_fd();
    wire::send(channel, &Filtered, &[listener.as_raw_fd(), network.as_raw_fd()]).map_err(|_| Errno::EPIPE)?;
    match wire::receive::<Watching>(channel) {
        Ok(Some(_)) => sys::close_above_2_on_exec(),
        Ok(None) | Err(_) => Err(Errno::EPIPE),
    }
}

/// Why a command that cannot be confined is not started, and what helps.
fn not_confined(errno: Errno) -> Failure {
    let remedy = match errno {
        Errno::EBUSY => Some(
            "a filter with a listener is in force already, as inside another `vnetctl run` or a container \
             whose manager intercepts system calls; start it outside of that",
        ),
        Errno::ENOSYS | Errno::E2BIG => Some(
            "this needs Linux 5.9 or later with CONFIG_SECCOMP_FILTER, on x86-64 or arm64; serve a VM with \
             `vnetctl up` instead",
        ),
        _ => None,
    };
    Failure {
        step: "confine the command, so it was not started".into(),
        cause: errno.desc().into(),
        remedy: remedy.map(str::to_owned),
    }
}

/// A pty in the guest's own devpts: first the front's side, then the guest's.
fn open_pty() -> Result<(OwnedFd, OwnedFd), Failure> {
    let step = "open a pseudo terminal for the guest";
    let master: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
        .open("/dev/pts/ptmx")
        .step(step)?
        .into();
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads the int that it is given.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) })
        .step(step)?;
    let terminal = sys::pty_peer(master.as_fd()).step(step)?;
    Ok((master, terminal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_the_way_of_confining_is_named_with_its_remedy() {
        let nested = not_confined(Errno::EBUSY).to_string();
        assert!(
            nested.contains("was not started") && nested.contains("inside another `vnetctl run`"),
            "{nested}"
        );
        assert!(not_confined(Errno::ENOSYS).to_string().contains("Linux 5.9"));
    }
}
