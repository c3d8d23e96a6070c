//! Which Unix sockets a command reaches: those that were bound inside its run, and those that its user opened
//! to it (`--socket`). A network namespace does not close Unix sockets by path: whoever can name the file can
//! connect to it, whenever and wherever it was bound.
//!
//! ```text
//!  command ──connect, listen──▶ kernel: stopped by the filter of `seccomp.rs`, told to the listener
//!                                  │ call, thread, arguments
//!                               watch (a child of the helper's, outside of the run's PID namespace)
//!                                  │ listen: notes which file the socket is bound to; the kernel goes on
//!                                  │ connect: copies the address, takes the socket over, connects it itself
//! ```
//!
//! What makes it hold against a command that changes its memory or its descriptors at the same time: the kernel
//! never goes on with a connect of the command's. [`Watch`] reads the address once, resolves it to a file that
//! it then holds (`O_PATH`), decides on that file, and connects the command's socket to that very file. How the
//! path led there (links, `..`, bind mounts, hard links, `/proc/PID/root`, a mount namespace of the command's
//! own) does not matter, because only the file is judged. A file is the run's own when a socket *of the run's
//! network namespaces* listened while bound to it, which the kernel tells (`SIOCUNIXFILE`); it is held from then
//! on, so that its number cannot be given to another.
//!
//! Datagram sockets can be addressed with every message, which nothing could look at without this race. So the
//! filter lets no Unix datagram socket be made, and io_uring is closed. A pair of them is made here, of
//! sequenced-packet sockets, which carry whole messages just as well and ignore addresses.
//!
//! What a connection through here differs in: `SO_PEERCRED` at its other end names the user and group, and no
//! process; outside, where the user opened a socket, it names the watch, which is in the run's network namespace
//! as the command is. A command that has the watch wait for it (with a file system of its own that does not answer,
//! say) waits itself, and harms nobody else.

mod caller;
mod notice;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use serde::{Deserialize, Serialize};

use self::caller::{Address, Caller};
use self::notice::{Answer, Listener, Notice};
use super::error::{Failure, Step};
use super::seccomp::Call;
use super::{sys, wire};

/// Files of listening sockets that are known as the run's own. Beyond it listen(2) says `ENOBUFS`.
pub(crate) const OWN_SOCKETS_MAX: usize = 1024;
/// Connects of blocking sockets that wait at the same time. Beyond it connect(2) says `ENOBUFS`.
pub(crate) const WAITING_MAX: usize = 256;
/// How often it is looked whether those who wait still do: one that a signal took away is not told.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// When a listener whose queue is full is first tried again; later ever more seldom, up to [`LOOK_INTERVAL`].
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Said by the command to be, beside the descriptors of the listener and of its network namespace.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Filtered;

/// Said to it: calls are looked after from here on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Watching;

/// A socket that the user opens to a command: the file that is there when the run begins, not whatever has
/// its name later, which the command could see to.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Its real path.
    pub(crate) path: PathBuf,
    /// The socket's file, held.
    pub(crate) file: OwnedFd,
}

impl Opened {
    /// Finds the socket at this path.
    pub(crate) fn find(path: &Path) -> Result<Opened, Failure> {
        let step = || format!("open the socket {} to the command", path.display());
        let real = std::fs::canonicalize(path).step(step())?;
        let file = hold(&real).step(step())?;
        let kind = file.metadata().step(step())?.file_type();
        if !kind.is_socket() {
            return Err(Failure::new(step(), "it is not a socket"));
        }
        Ok(Opened {
            path: real,
            file: file.into(),
        })
    }
}

/// Whom this file is, whatever its names are.
type FileId = (u64, u64);

fn id(file: &OwnedFd) -> nix::Result<FileId> {
    let found = nix::sys::stat::fstat(file)?;
    Ok((found.st_dev, found.st_ino))
}

fn hold(path: &Path) -> std::io::Result<File> {
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)
}

/// What is needed before the namespaces are entered.
#[derive(Debug)]
pub(crate) struct Outside {
    /// The `/proc` in which this process is found.
    proc: OwnedFd,
    /// The network namespace that a run's sockets are never of.
    network: FileId,
    opened: Vec<Opened>,
}

impl Outside {
    /// To be called in the namespaces of the caller of `vnetctl run`.
    pub(crate) fn look(opened: Vec<Opened>) -> Result<Outside, Failure> {
        let proc = hold(Path::new("/proc")).step("hold /proc")?;
        let network = File::open("/proc/self/ns/net").step("open this network namespace")?;
        Ok(Outside {
            proc: proc.into(),
            network: id(&network.into()).step("look at this network namespace")?,
            opened,
        })
    }

    /// What the user opens.
    pub(crate) fn opened(&self) -> &[Opened] {
        &self.opened
    }
}

/// The process that looks after a command's calls; ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Watcher(Pid);

/// Forks it. The other end of `channel` is where the command to be sends the listener. To be called with one
/// thread, in the guest's user namespace and outside of its PID namespace.
pub(crate) fn watch(channel: &OwnedFd, outside: &Outside) -> Result<Watcher, Failure> {
    // SAFETY: the process has one thread, so the child may do whatever its parent may.
    match unsafe { fork() }.step("fork the process that looks after the guest's sockets")? {
        ForkResult::Parent { child } => Ok(Watcher(child)),
        ForkResult::Child => {
            // Without it the command does not start, or its calls fail: nothing opens.
            let _ = serve(channel, outside);
            // SAFETY: ends this forked process without running the exit handlers of the program it is.
            unsafe { libc::_exit(0) }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

fn serve(channel: &OwnedFd, outside: &Outside) -> nix::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let _ = nix::sys::prctl::set_name(c"vnet-sockets");
    // The front's end of things, above all: it hears the helper's end by it.
    let mut kept: Vec<_> = outside
        .opened
        .iter()
        .map(|socket| socket.file.as_raw_fd())
        .collect();
    kept.extend([channel.as_raw_fd(), outside.proc.as_raw_fd()]);
    sys::close_above_2_but(&mut kept)?;
    let received = wire::receive::<Filtered>(channel.as_fd()).map_err(|_| Errno::EIO)?;
    let mut fds = received.map(|(_, fds)| fds).unwrap_or_default().into_iter();
    let (Some(listener), Some(network)) = (fds.next(), fds.next()) else {
        return Ok(());
    };
    // Whoever looks at the other end of a connection, as vnet's own controlplane does, is to find it there.
    nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET)?;
    // Every socket that is held costs a descriptor. The command has its own limit by now.
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    if let Ok((_, hard)) = nix::sys::resource::getrlimit(files) {
        let _ = nix::sys::resource::setrlimit(files, hard, hard);
    }
    let mut opened = HashMap::new();
    for socket in &outside.opened {
        opened.insert(
            id(&socket.file)?,
            socket.file.try_clone().map_err(|_| Errno::EMFILE)?,
        );
    }
    let watch = Watch {
        listener: Listener::new(listener)?,
        proc: outside.proc.try_clone().map_err(|_| Errno::EMFILE)?,
        network: outside.network,
        opened,
        own: HashMap::new(),
        waiting: Vec::new(),
    };
    wire::send(channel.as_fd(), &Watching, &[]).map_err(|_| Errno::EIO)?;
    watch.run()
}

/// Its state.
struct Watch {
    listener: Listener,
    proc: OwnedFd,
    network: FileId,
    /// What the user opens.
    opened: HashMap<FileId, OwnedFd>,
    /// Files to which a listening socket of the run was bound, held so that they stay who they are.
    own: HashMap<FileId, OwnedFd>,
    waiting: Vec<Waiting>,
}

/// A connect of a blocking socket that is not done yet.
struct Waiting {
    notice: Notice,
    caller: Caller,
    socket: OwnedFd,
    to: Destination,
    deadline: Option<Instant>,
    /// How long until it is looked at again.
    interval: Duration,
    /// When that is.
    look_at: Instant,
}

/// Where a socket is to be connected to.
enum Destination {
    /// The run's own socket with this file.
    File(OwnedFd),
    /// As the command said.
    Verbatim(Vec<u8>),
}

impl Watch {
    /// Until nobody is left who has the filter.
    fn run(mut self) -> nix::Result<()> {
        loop {
            let (heard, over) = self.wait()?;
            self.look_at_waiting();
            if heard {
                match self.listener.receive() {
                    Ok(notice) => self.heard(notice),
                    // It was taken away by a signal since.
                    Err(Errno::ENOENT | Errno::EINTR) => {}
                    Err(error) => return Err(error),
                }
            } else if over {
                return Ok(());
            }
        }
    }

    /// Waits for something to do: whether a call is to be heard, and whether none will ever be again. Of those who
    /// wait, whom something happened to is due.
    fn wait(&mut self) -> nix::Result<(bool, bool)> {
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let mut next = None;
        for waiting in &self.waiting {
            // Its end is told at once, so that a socket which nobody has any more is let go.
            fds.push(PollFd::new(waiting.caller.process(), PollFlags::POLLIN));
            fds.push(match waiting.to {
                Destination::Verbatim(_) => PollFd::new(waiting.socket.as_fd(), PollFlags::POLLOUT),
                // There is no event for room in a listener's queue, and a Unix socket that is not connected
                // would be said to be hung up without end.
                Destination::File(_) => PollFd::new(waiting.caller.process(), PollFlags::empty()),
            });
            let due = waiting
                .deadline
                .map_or(waiting.look_at, |at| at.min(waiting.look_at));
            next = Some(next.map_or(due, |next: Instant| next.min(due)));
        }
        // Rounded up: a deadline is over then.
        let timeout = next.map_or(PollTimeout::NONE, |next| {
            let patience = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        let happened = |fd: &PollFd<'_>, events| fd.revents().is_some_and(|told| told.intersects(events));
        // One that fails is ready to tell so.
        const READY: PollFlags = PollFlags::POLLOUT
            .union(PollFlags::POLLERR)
            .union(PollFlags::POLLHUP);
        let heard = happened(&fds[0], PollFlags::POLLIN);
        let over = happened(&fds[0], PollFlags::POLLHUP | PollFlags::POLLERR);
        let due: Vec<bool> = fds[1..]
            .chunks(2)
            .map(|pair| happened(&pair[0], PollFlags::POLLIN) || happened(&pair[1], READY))
            .collect();
        let now = Instant::now();
        for (waiting, due) in self.waiting.iter_mut().zip(due) {
            if due {
                waiting.look_at = now;
            }
        }
        Ok((heard, over))
    }

    fn heard(&mut self, notice: Notice) {
        let answer = match notice.call {
            None => Answer::Failed(Errno::ENOSYS),
            Some(Call::Listen) => self.listens(&notice),
            Some(Call::DatagramPair) => match self.pairs(&notice) {
                Ok(()) => Answer::Done,
                Err(errno) => Answer::Failed(errno),
            },
            Some(Call::Connect) => match self.connects(&notice) {
                Ok(Some(waiting)) => return self.keep(waiting),
                Ok(None) => Answer::Done,
                Err(errno) => Answer::Failed(errno),
            },
        };
        self.listener.answer(&notice, answer);
    }

    /// Takes note of the file that a socket is bound to which will listen. The call itself may go on
    /// whatever its arguments have become: to listen opens nothing.
    fn listens(&mut self, notice: &Notice) -> Answer {
        let noted = Caller::find(&self.proc, notice.thread).and_then(|caller| {
            let socket = caller.take_socket(notice.arguments[0])?;
            self.listener.is_valid(notice)?;
            if sys::socket_domain(socket.as_fd())? == libc::AF_UNIX && self.is_of_the_run(&socket)? {
                match sys::unix_socket_file(socket.as_fd()) {
                    Ok(file) => self.note(file)?,
                    // It has no file: an abstract name, or none.
                    Err(Errno::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        match noted {
            Ok(()) => Answer::GoOn,
            Err(errno) => Answer::Failed(errno),
        }
    }

    fn note(&mut self, file: OwnedFd) -> nix::Result<()> {
        let id = id(&file)?;
        if self.own.len() >= OWN_SOCKETS_MAX && !self.own.contains_key(&id) {
            // Those without a name any more can hardly be connected to.
            self.own
                .retain(|_, file| nix::sys::stat::fstat(file).is_ok_and(|found| found.st_nlink > 0));
            if self.own.len() >= OWN_SOCKETS_MAX {
                return Err(Errno::ENOBUFS);
            }
        }
        self.own.insert(id, file);
        Ok(())
    }

    /// A socket that came from outside (inherited, or received) is none that a run may connect anywhere.
    fn is_of_the_run(&self, socket: &OwnedFd) -> nix::Result<bool> {
        match sys::socket_network(socket.as_fd()) {
            Ok(network) => Ok(id(&network)? != self.network),
            // Of a namespace that is not below this one.
            Err(Errno::EPERM) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Connects the socket in the command's stead; a blocking one may have to wait.
    fn connects(&mut self, notice: &Notice) -> nix::Result<Option<Waiting>> {
        let caller = Caller::find(&self.proc, notice.thread)?;
        let socket = caller.take_socket(notice.arguments[0])?;
        let address = caller.read_address(notice.arguments[1], notice.arguments[2])?;
        let unix = sys::socket_domain(socket.as_fd())? == libc::AF_UNIX;
        if !self.is_of_the_run(&socket)? {
            return Err(Errno::EACCES);
        }
        let to = match address {
            Address::Path(path) if unix => {
                let file = caller.resolve(&self.proc, &path)?;
                // The thread was there all the time, so it was it that was looked at.
                self.listener.is_valid(notice)?;
                let known = id(&file)?;
                let kind = nix::sys::stat::fstat(&file)?.st_mode & libc::S_IFMT;
                if kind == libc::S_IFSOCK
                    && !self.own.contains_key(&known)
                    && !self.opened.contains_key(&known)
                {
                    return Err(Errno::EACCES);
                }
                Destination::File(file)
            }
            Address::Path(path) => Destination::Verbatim(caller::unix_address(&path)),
            Address::Other(bytes) => {
                self.listener.is_valid(notice)?;
                Destination::Verbatim(bytes)
            }
        };
        let blocks = !is_nonblocking(&socket)?;
        match self.try_connect(&socket, &to) {
            Ok(()) => Ok(None),
            Err(error) if blocks && is_not_yet(error) => {
                if self.waiting.len() >= WAITING_MAX {
                    return Err(Errno::ENOBUFS);
                }
                let deadline = sys::send_timeout(socket.as_fd())?.map(|patience| Instant::now() + patience);
                let interval = match to {
                    Destination::File(_) => RETRY_INTERVAL,
                    Destination::Verbatim(_) => LOOK_INTERVAL,
                };
                Ok(Some(Waiting {
                    notice: *notice,
                    caller,
                    socket,
                    to,
                    deadline,
                    interval,
                    look_at: Instant::now() + interval,
                }))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a pair of sockets that carry whole messages to each other and to nobody else.
    fn pairs(&self, notice: &Notice) -> nix::Result<()> {
        let caller = Caller::find(&self.proc, notice.thread)?;
        // The kernel takes ints and ignores the rest of the registers.
        let [kind, protocol] = [notice.arguments[1] as i32, notice.arguments[2] as i32];
        let flags = kind & (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
        let (one, other) = sys::seqpacket_pair(flags | libc::SOCK_CLOEXEC, protocol)?;
        self.listener.is_valid(notice)?;
        let close_on_exec = flags & libc::SOCK_CLOEXEC != 0;
        let numbers = [
            self.listener.give(notice, &one, close_on_exec)?,
            self.listener.give(notice, &other, close_on_exec)?,
        ];
        caller.write_pair(notice.arguments[3], numbers)
    }

    fn keep(&mut self, waiting: Waiting) {
        self.waiting.push(waiting);
    }

    /// Tries those that wait once more, and forgets those that wait no more.
    fn look_at_waiting(&mut self) {
        let now = Instant::now();
        for mut waiting in std::mem::take(&mut self.waiting) {
            let over = waiting.deadline.is_some_and(|deadline| deadline <= now);
            if waiting.look_at > now && !over {
                self.waiting.push(waiting);
                continue;
            }
            if self.listener.is_valid(&waiting.notice).is_err() {
                continue;
            }
            let answer = match self.try_connect(&waiting.socket, &waiting.to) {
                // The attempt before has succeeded.
                Ok(()) | Err(Errno::EISCONN) => Answer::Done,
                Err(error) if is_not_yet(error) && !over => {
                    waiting.interval = (waiting.interval * 2).min(LOOK_INTERVAL);
                    waiting.look_at = now + waiting.interval;
                    self.waiting.push(waiting);
                    continue;
                }
                // As the kernel has it when SO_SNDTIMEO is over (socket(7)).
                Err(Errno::EALREADY) => Answer::Failed(Errno::EINPROGRESS),
                Err(error) => Answer::Failed(error),
            };
            self.listener.answer(&waiting.notice, answer);
        }
    }

    /// One attempt that does not block.
    fn try_connect(&self, socket: &OwnedFd, to: &Destination) -> nix::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
        let blocks = !flags.contains(OFlag::O_NONBLOCK);
        // The flag is the socket's, not the descriptor's; its owner waits meanwhile. One who changes it at
        // the same time has the watch wait for him, and himself with it.
        if blocks {
            fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let done = match to {
            Destination::Verbatim(address) => caller::unprivileged(|| sys::connect(socket.as_fd(), address)),
            Destination::File(file) => {
                nix::unistd::fchdir(&self.proc)?;
                let path = format!("self/fd/{}", file.as_raw_fd());
                caller::unprivileged(|| sys::connect(socket.as_fd(), &caller::unix_address(path.as_bytes())))
            }
        };
        if blocks {
            fcntl(socket, FcntlArg::F_SETFL(flags))?;
        }
        done
    }
}

fn is_nonblocking(socket: &OwnedFd) -> nix::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    Ok(flags.contains(OFlag::O_NONBLOCK))
}

/// What connect(2) says of a socket that does not block and is under way, or of a listener whose queue is full.
fn is_not_yet(error: Errno) -> bool {
    matches!(error, Errno::EINPROGRESS | Errno::EALREADY | Errno::EAGAIN)
}
