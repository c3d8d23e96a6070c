//! The process between front and guest: it enters the namespaces, makes the link, forks init, and then
//! only carries signals and the exit status, and looks after the guest's sockets (`sockets`). It ends, and init with
//! it, when the front does: the kernel kills it (prctl(2), `PR_SET_PDEATHSIG`), and the end of their socket pair tells
//! the same.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use ipnet::{Ipv4Net, Ipv6Net};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::error::{Failure, Step};
use super::init::Init;
use super::sockets::{self, Opened, Outside};
use super::wire::{self, Order, Reply, Request};
use super::{EXIT_FAILED, claims, link, masks, mounts, sys, userns};

/// The whole life of the helper. `command` is what follows [`GUEST_ARGUMENT`](super::GUEST_ARGUMENT).
/// To be called in a process that has not started a thread.
pub fn guest_main(command: Vec<OsString>) -> ExitCode {
    let control = match take_control() {
        Ok(control) => control,
        Err(failure) => {
            crate::output::say(format_args!(
                "vnetctl: {failure}; this is started by `vnetctl run`, not by hand"
            ));
            return EXIT_FAILED.into();
        }
    };
    match serve(&control, command) {
        Ok(code) => code.into(),
        Err(failure) => {
            let _ = wire::send(control.as_fd(), &Reply::Failed(failure), &[]);
            EXIT_FAILED.into()
        }
    }
}

/// The channel to the front comes as standard input; it makes room for nothing.
fn take_control() -> Result<OwnedFd, Failure> {
    let step = "take over the channel to the front";
    // SAFETY: standard input stays open for the whole call.
    let stdin = unsafe { BorrowedFd::borrow_raw(0) };
    nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(0).step(step)?;
    let fd = fcntl(stdin, FcntlArg::F_DUPFD_CLOEXEC(3)).step(step)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    let control = unsafe { OwnedFd::from_raw_fd(fd) };
    let null = std::fs::File::open("/dev/null").step("open /dev/null")?;
    // SAFETY: replaces standard input, which nothing here owns as an `OwnedFd`.
    Errno::result(unsafe { libc::dup2(null.as_raw_fd(), 0) }).step(step)?;
    Ok(control)
}

fn serve(control: &OwnedFd, command: Vec<OsString>) -> Result<u8, Failure> {
    // Away from the terminal's keys: those are for the front.
    let _ = nix::unistd::setsid();
    sys::reset_signals().step("reset signals")?;
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigIgn) }.step("ignore SIGPIPE")?;
    let _ = nix::sys::prctl::set_name(c"vnet-guest");
    die_with_parent()?;
    let received = wire::receive::<Request>(control.as_fd()).step("read what guest to make")?;
    // The front is gone already.
    let Some((request, streams)) = received else {
        return Ok(EXIT_FAILED);
    };
    if command.is_empty() {
        return Err(Failure::new("start the guest", "no command given"));
    }

    let cwd = std::env::current_dir().ok();
    let uid = nix::unistd::geteuid().as_raw();
    let opened = mounts::paths(request.sockets)
        .iter()
        .map(|path| Opened::find(path))
        .collect::<Result<_, _>>()?;
    let outside = Outside::look(opened)?;
    let own = mounts::paths(request.masks);
    let places = masks::places(uid, |name| std::env::var_os(name), own.clone());
    let (channel, sockets) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .step("make a channel for the guest's sockets")?;
    let watcher = userns::enter(|| sockets::watch(&channel, &outside))?;
    drop(channel);
    // Entering may have changed the credentials, which takes it back.
    die_with_parent()?;
    if let Some(name) = &request.hostname {
        nix::unistd::sethostname(name).step(format!("set the guest's host name to {name:?}"))?;
    }
    let guest = Ipv4Net::new(request.guest.0, request.guest.1).step("read the guest's address")?;
    let ipv6 = request
        .ipv6
        .map(|(address, length, router)| Ipv6Net::new(address, length).map(|net| (net, router)))
        .transpose()
        .step("read the guest's IPv6 address")?;
    let made = link::make(
        guest,
        request.gateway,
        ipv6,
        request.mtu_bytes,
        request.force_packet_socket,
    )?;

    let (gate, opener) = std::io::pipe().step("make a pipe")?;
    // SAFETY: the process has one thread, so the child may do whatever its parent may.
    match unsafe { fork() }.step("fork the guest's first process")? {
        ForkResult::Child => {
            drop(opener);
            // Its parent's to end.
            std::mem::forget(watcher);
            let control = control.try_clone().step("copy the channel to the front")?;
            die_with_parent()?;
            Init {
                command,
                cwd,
                places,
                own,
                programs: mounts::paths(request.programs),
                writable: request.writable.map(mounts::paths),
                outside,
                sockets,
                resolv_conf: mounts::resolv_conf(request.gateway),
                pty: request.pty,
                streams,
                link: made.fd,
                kind: made.kind,
                mac: made.mac,
                notes: made.notes,
                control,
                gate,
            }
            .run()
        }
        ForkResult::Parent { child } => {
            // Their only holders are to be init and the front.
            drop((made, streams, gate, sockets));
            let code = relay(control, child, opener);
            drop(watcher);
            code
        }
    }
}

/// Carries orders to init until it ends.
fn relay(control: &OwnedFd, init: Pid, mut opener: std::io::PipeWriter) -> Result<u8, Failure> {
    let ended = sys::pidfd(init).step("watch the guest's first process")?;
    loop {
        let mut fds = [
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Failure::new("wait for the guest", error)),
        }
        if fds[1].any().unwrap_or(true) {
            return Ok(match waitpid(init, None) {
                Ok(WaitStatus::Exited(_, code)) => code as u8,
                Ok(WaitStatus::Signaled(_, signal, _)) => (128 + signal as i32) as u8,
                _ => EXIT_FAILED,
            });
        }
        if fds[0].any().unwrap_or(true) {
            match wire::receive::<Order>(control.as_fd()) {
                // Init finds the pipe closed if it is gone; the next turn of the loop tells.
                Ok(Some((Order::Start, _))) => drop(opener.write_all(&[1])),
                Ok(Some((Order::Signal(number), _))) => {
                    if let Ok(signal) = Signal::try_from(number) {
                        let _ = kill(init, signal);
                    }
                }
                Ok(Some((Order::Whose(number, remote), _))) => {
                    let owners = claims::owners(Path::new("/proc"), remote);
                    let _ = wire::send(control.as_fd(), &Reply::Owners(number, owners), &[]);
                }
                // The front is gone, or says what cannot be understood: the guest ends.
                Ok(None) | Err(_) => {
                    let _ = kill(init, Signal::SIGKILL);
                    let _ = waitpid(init, None);
                    return Ok(EXIT_FAILED);
                }
            }
        }
    }
}

/// Has the kernel kill this process when its parent ends.
fn die_with_parent() -> Result<(), Failure> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).step("tie this process to its parent")
}
