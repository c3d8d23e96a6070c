//! The front's side of a guest: starting the helper, holding the descriptors, hearing what becomes of
//! the command.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc as std_mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::claims::Remote;
use super::error::SandboxError;
use super::wire::{self, Order, Reply, Request};
use super::{EXIT_FAILED, GUEST_ARGUMENT, Spec, mounts};

/// Stops of the command that may wait to be heard; further ones are not told.
const MAX_EVENTS: usize = 16;
/// Answers about programs that may wait to be read; one is waited for at a time.
const MAX_OWNERS: usize = 4;
/// How long the helper may take to say which program has a socket.
const OWNERS_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a guest may take to end in good order before its helper is killed.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// The largest MTU of a TAP device: 65535 less the Ethernet header.
const MAX_MTU_BYTES: u16 = 65521;
/// What every IPv4 host accepts, RFC 791 §3.2.
const MIN_MTU_BYTES: u16 = 576;

/// What the other end of a guest's interface is. Both carry one whole Ethernet frame per read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkKind {
    /// A TAP device.
    Tap,
    /// A packet socket on the far end of a veth pair.
    Packet,
}

/// The other end of a guest's interface.
#[derive(Debug)]
pub struct Link {
    /// Non-blocking. The guest's interface is gone when its last copy is closed.
    pub fd: OwnedFd,
    /// What it is.
    pub kind: LinkKind,
    /// The guest's MAC address.
    pub mac: [u8; 6],
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// What `vnetctl run` exits with: the command's code, 128+N for a signal, 125 to 127 as `env`.
    pub code: u8,
    /// The signal that ended the command.
    pub signal: Option<i32>,
    /// Why there is no code of the command's own.
    pub reason: Option<String>,
}

/// What becomes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It was stopped by this signal; [`Sandbox::signal`] with `SIGCONT` lets it go on.
    Stopped(i32),
    /// It ended, and every process of the guest with it.
    Exited(Exit),
}

/// A guest. Dropping it ends every process in it.
#[derive(Debug)]
pub struct Sandbox {
    /// The guest's interface; to be taken by whoever serves it.
    pub link: Option<Link>,
    /// The front's side of the guest's pty, if one was asked for; to be taken by the terminal.
    pub pty: Option<OwnedFd>,
    /// What could not be had and does not matter much, for the log.
    pub notes: Vec<String>,
    control: OwnedFd,
    helper: Pid,
    events: mpsc::Receiver<Event>,
    owners: mpsc::Receiver<(u64, Vec<String>)>,
    asked: u64,
    exit: Option<Exit>,
    done: std_mpsc::Receiver<()>,
}

/// Makes a guest whose command waits for [`Sandbox::start`]. Blocks for some tens of milliseconds.
///
/// # Errors
/// [`SandboxError::Setup`] says what the system refused, and what helps.
pub fn spawn(spec: &Spec) -> Result<Sandbox, SandboxError> {
    check(spec)?;
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| channel("opening it", errno.into()))?;
    let (first_sender, first) = std_mpsc::channel();
    let (event_sender, events) = mpsc::channel(MAX_EVENTS);
    let (owners_sender, owners) = mpsc::channel(MAX_OWNERS);
    let (done_sender, done) = std_mpsc::channel();
    let command = helper_command(spec, theirs);
    let listener = ours.try_clone().map_err(|error| channel("copying it", error))?;
    // The helper dies with the thread that started it, so that thread must live as long: a worker of a
    // runtime may not.
    thread::Builder::new()
        .name("vnet-guest".into())
        .spawn(move || {
            attend(command, &listener, &first_sender, &event_sender, &owners_sender);
            drop(done_sender);
        })
        .map_err(|error| channel("starting the thread that attends it", error))?;

    let helper = match first.recv() {
        Ok(First::Started(pid)) => pid,
        Ok(First::NotStarted { program, source }) => {
            return Err(SandboxError::Spawn { program, source });
        }
        Ok(_) | Err(_) => return Err(died("it was never started")),
    };
    let mut sandbox = Sandbox {
        link: None,
        pty: None,
        notes: Vec::new(),
        control: ours,
        helper,
        events,
        owners,
        asked: 0,
        exit: None,
        done,
    };
    let (request, streams) = request(spec);
    wire::send(sandbox.control.as_fd(), &request, &streams)
        .map_err(|error| channel("telling it what guest to make", error))?;
    match first.recv() {
        Ok(First::Reply(Reply::Ready { kind, mac, notes }, fds)) => {
            let mut fds = fds.into_iter();
            let fd = fds.next().ok_or_else(|| died("it sent no link"))?;
            sandbox.link = Some(Link { fd, kind, mac });
            sandbox.pty = fds.next();
            sandbox.notes = notes;
            Ok(sandbox)
        }
        Ok(First::Reply(Reply::Failed(failure), _)) => Err(SandboxError::Setup(failure)),
        Ok(First::Reply(..)) => Err(died("it said something unexpected")),
        Ok(First::Ended(status)) => Err(died(&status)),
        Ok(_) | Err(_) => Err(died("for no known reason")),
    }
}

impl Sandbox {
    /// Starts the command.
    ///
    /// # Errors
    /// The helper is gone; [`Sandbox::event`] tells how.
    pub fn start(&self) -> Result<(), SandboxError> {
        wire::send(self.control.as_fd(), &Order::Start, &[])
            .map_err(|error| channel("starting the command", error))
    }

    /// Passes a signal on: `SIGTERM`, `SIGUSR1` and `SIGUSR2` to the command itself, others to its whole
    /// process group, as a terminal would.
    ///
    /// # Errors
    /// The helper is gone; [`Sandbox::event`] tells how.
    pub fn signal(&self, number: i32) -> Result<(), SandboxError> {
        wire::send(self.control.as_fd(), &Order::Signal(number), &[])
            .map_err(|error| channel("passing a signal on", error))
    }

    /// Which programs of the guest have a socket that leads there, as `curl (pid 7)`: what the guest claims, to be
    /// shown to a person and never to decide by. None where that cannot be told, or not soon.
    pub async fn owners(&mut self, remote: Remote) -> Vec<String> {
        self.asked += 1;
        if wire::send(self.control.as_fd(), &Order::Whose(self.asked, remote), &[]).is_err() {
            return Vec::new();
        }
        let asked = self.asked;
        let answer = async {
            while let Some((number, found)) = self.owners.recv().await {
                if number == asked {
                    return found;
                }
            }
            Vec::new()
        };
        tokio::time::timeout(OWNERS_TIMEOUT, answer)
            .await
            .unwrap_or_default()
    }

    /// The process whose end is the guest's end.
    pub fn helper_pid(&self) -> i32 {
        self.helper.as_raw()
    }

    /// What happens next to the command. Cancel safe; after the end it says the same again.
    pub async fn event(&mut self) -> Event {
        if self.exit.is_none() {
            match self.events.recv().await {
                Some(Event::Exited(exit)) => self.exit = Some(exit),
                Some(stopped) => return stopped,
                None => {}
            }
        }
        let lost = || Exit {
            code: EXIT_FAILED,
            signal: None,
            reason: Some("lost the guest".into()),
        };
        Event::Exited(self.exit.get_or_insert_with(lost).clone())
    }

    /// Waits for the end of the command. A command that was stopped is waited for as well.
    pub async fn wait(&mut self) -> Exit {
        loop {
            if let Event::Exited(exit) = self.event().await {
                return exit;
            }
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // So that the thread that attends the helper waits for no reader.
        self.events.close();
        // The helper hears the end of the channel, kills init, and waits until the guest is empty.
        let _ = shutdown(self.control.as_raw_fd(), Shutdown::Both);
        if let Err(std_mpsc::RecvTimeoutError::Timeout) = self.done.recv_timeout(END_TIMEOUT) {
            // Not reaped yet, or the thread that does it would be done: the number is still its own.
            let _ = kill(self.helper, Signal::SIGKILL);
            let _ = self.done.recv_timeout(END_TIMEOUT);
        }
    }
}

/// What the attending thread says before the guest is ready.
enum First {
    Started(Pid),
    NotStarted { program: String, source: io::Error },
    Reply(Reply, Vec<OwnedFd>),
    Ended(String),
}

/// The life of the thread that starts the helper, hears it, and reaps it.
fn attend(
    mut command: Command,
    control: &OwnedFd,
    first: &std_mpsc::Sender<First>,
    events: &mpsc::Sender<Event>,
    owners: &mpsc::Sender<(u64, Vec<String>)>,
) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(source) => {
            let program = command.get_program().to_string_lossy().into_owned();
            let _ = first.send(First::NotStarted { program, source });
            return;
        }
    };
    // With it goes our copy of the helper's end: from now on its end of the channel is told.
    drop(command);
    let _ = first.send(First::Started(pid_of(&child)));
    let mut last = None;
    while let Ok(Some((reply, fds))) = wire::receive::<Reply>(control.as_fd()) {
        match reply {
            Reply::Ready { .. } => drop(first.send(First::Reply(reply, fds))),
            Reply::Failed(ref failure) => {
                last = Some(Exit {
                    code: EXIT_FAILED,
                    signal: None,
                    reason: Some(failure.to_string()),
                });
                let _ = first.send(First::Reply(reply, fds));
            }
            // Told while there is room: a command that stops without end is heard often enough.
            Reply::Stopped(signal) => drop(events.try_send(Event::Stopped(signal))),
            // One that nobody waits for any more is lost.
            Reply::Owners(number, found) => drop(owners.try_send((number, found))),
            Reply::NotExecuted { code, reason } => {
                last = Some(Exit {
                    code,
                    signal: None,
                    reason: Some(reason),
                });
            }
            Reply::Exited { code, signal } => {
                last = Some(Exit {
                    code,
                    signal,
                    reason: None,
                })
            }
        }
    }
    // Seen before it is reaped, so that `Drop` never signals a number that is another process by now.
    let _ = waitid(
        Id::Pid(pid_of(&child)),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
    );
    let status = child
        .wait()
        .map_or_else(|error| error.to_string(), |status| status.to_string());
    let _ = first.send(First::Ended(status.clone()));
    let reason = format!("the guest's helper process ended before the command did ({status})");
    let exit = last.unwrap_or(Exit {
        code: EXIT_FAILED,
        signal: None,
        reason: Some(reason),
    });
    // Room is made by the reader; if there is none, nobody waits.
    let _ = events.blocking_send(Event::Exited(exit));
}

fn pid_of(child: &Child) -> Pid {
    // Process numbers fit by POSIX.
    Pid::from_raw(child.id() as i32)
}

fn check(spec: &Spec) -> Result<(), SandboxError> {
    let wrong = |text: String| Err(SandboxError::Spec(text));
    if spec.command.is_empty() {
        return wrong("no command given; name one after --".into());
    }
    if !(MIN_MTU_BYTES..=MAX_MTU_BYTES).contains(&spec.mtu_bytes) {
        let mtu = spec.mtu_bytes;
        return wrong(format!(
            "mtu {mtu} is out of range (expected {MIN_MTU_BYTES} to {MAX_MTU_BYTES})"
        ));
    }
    if !spec.guest.contains(&spec.gateway) || spec.guest.addr() == spec.gateway {
        let (gateway, guest) = (spec.gateway, spec.guest);
        return wrong(format!(
            "gateway {gateway} is not another address of the guest's subnet {guest}"
        ));
    }
    if let Some((guest, router)) = spec.ipv6
        && (!guest.contains(&router) || guest.addr() == router)
    {
        return wrong(format!(
            "router {router} is not another address of the guest's prefix {guest}"
        ));
    }
    for (number, name) in (0..).zip(["stdin", "stdout", "stderr"]) {
        if !spec.pty[number as usize] && !is_harmless(number) {
            return wrong(format!(
                "{name} is a socket of the host's network that could be sent elsewhere (expected a connected \
                 stream); pass it through a pipe, as in `cat | vnetctl run ...`"
            ));
        }
    }
    Ok(())
}

/// A socket keeps the network that it was made in. One that is connected as a stream leads where it leads; any other
/// leads the command past its own network.
fn is_harmless(stream: RawFd) -> bool {
    use nix::sys::socket::{SockaddrStorage, getpeername, getsockopt, sockopt::SockType as Type};
    // SAFETY: standard streams stay open for the whole call, or it fails.
    let fd = unsafe { BorrowedFd::borrow_raw(stream) };
    match getsockopt(&fd, Type) {
        // No socket, or closed.
        Err(_) => true,
        Ok(SockType::Stream | SockType::SeqPacket) => getpeername::<SockaddrStorage>(stream).is_ok(),
        Ok(_) => false,
    }
}

/// The command that becomes the helper.
fn helper_command(spec: &Spec, control: OwnedFd) -> Command {
    // The file that this process runs, even if it was replaced since.
    let program = spec
        .program
        .clone()
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let mut command = Command::new(program);
    command
        .arg0("vnetctl")
        .arg(GUEST_ARGUMENT)
        .args(&spec.command)
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::from(control))
        .stdout(Stdio::null());
    if let Some(cwd) = &spec.cwd {
        command.current_dir(cwd);
    }
    command
}

/// The request, and the standard streams that the command inherits.
fn request(spec: &Spec) -> (Request, Vec<RawFd>) {
    let streams = (0..)
        .zip(spec.pty)
        .filter(|(_, pty)| !pty)
        .map(|(number, _)| number)
        .collect();
    let terminals = crate::terminal::device_paths();
    let bytes =
        |paths: &[PathBuf]| -> Vec<Vec<u8>> { paths.iter().map(|path| mounts::path_bytes(path)).collect() };
    let mut masks = bytes(&spec.masks);
    masks.extend(bytes(&terminals));
    let request = Request {
        mtu_bytes: spec.mtu_bytes,
        guest: (spec.guest.addr(), spec.guest.prefix_len()),
        gateway: spec.gateway,
        ipv6: spec
            .ipv6
            .map(|(net, router)| (net.addr(), net.prefix_len(), router)),
        hostname: spec.hostname.clone(),
        masks,
        programs: bytes(&spec.programs),
        writable: spec.writable.as_deref().map(bytes),
        sockets: bytes(&spec.sockets),
        pty: spec.pty,
        force_packet_socket: spec.force_packet_socket,
    };
    (request, streams)
}

fn channel(doing: &'static str, source: io::Error) -> SandboxError {
    SandboxError::Channel { doing, source }
}

fn died(status: &str) -> SandboxError {
    SandboxError::HelperDied {
        status: status.into(),
    }
}
