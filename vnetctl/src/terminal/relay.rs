//! The thread that carries bytes between the real terminal and the pty, and shows questions.
//!
//! It reads only what poll(2) says is there, because the real terminal cannot be made non-blocking
//! without doing so to the shell as well. The pty is non-blocking: a command that does not read its keys
//! does not keep its output from being shown.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;

use super::keys::{Key, first_key};
use super::tty::Real;
use super::{GRACE, MAX_HELD_BYTES};

/// Keys that may wait for the command; the real terminal keeps the rest.
const MAX_TYPED_BYTES: usize = 64 * 1024;
/// Questions that may wait for the one that is shown; further ones are not asked.
const MAX_PROMPTS: usize = 64;
/// How much is read at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// What is asked of the thread.
pub(super) enum Request {
    Prompt {
        question: String,
        reply: oneshot::Sender<Key>,
    },
    Say(String),
    TypeIn(Vec<u8>),
    /// End once the command's last output is shown.
    Finish,
    /// End now.
    Stop,
}

/// The way to the thread.
#[derive(Clone)]
pub(super) struct Sender {
    requests: mpsc::Sender<Request>,
    wake: Arc<PipeWriter>,
}

impl Sender {
    pub(super) fn send(&self, request: Request) {
        // The thread ends before its sender only with the pty; then nobody waits for an answer.
        if self.requests.send(request).is_ok() {
            self.wake();
        }
    }

    /// Has the thread look at everything again.
    pub(super) fn wake(&self) {
        // Non-blocking: a full pipe wakes as well.
        let _ = (&*self.wake).write(&[1]);
    }

    /// Wakes the thread when it is dropped: a question may have been taken back.
    pub(super) fn waker(&self) -> impl Drop + use<> {
        struct Waker(Sender);
        impl Drop for Waker {
            fn drop(&mut self) {
                self.0.wake();
            }
        }
        Waker(self.clone())
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

/// Starts the thread. What it returns second tells its end.
pub(super) fn start(
    pty: OwnedFd,
    real: Arc<Real>,
    paused: Arc<AtomicBool>,
) -> io::Result<(Sender, oneshot::Receiver<()>)> {
    let (woken, wake) = std::io::pipe()?;
    set_nonblocking(&woken)?;
    set_nonblocking(&wake)?;
    set_nonblocking(&pty)?;
    let (requests, receiver) = mpsc::channel();
    let (ended, finished) = oneshot::channel();
    let relay = Relay {
        pty: Some(pty),
        real,
        paused,
        requests: receiver,
        woken,
        typed: VecDeque::new(),
        held: Vec::new(),
        prompts: VecDeque::new(),
        shown_at: None,
        at_line_start: true,
        keyboard_gone: false,
        finishing: false,
    };
    std::thread::Builder::new()
        .name("vnet-terminal".into())
        .spawn(move || {
            relay.run();
            drop(ended);
        })?;
    Ok((
        Sender {
            requests,
            wake: Arc::new(wake),
        },
        finished,
    ))
}

struct Prompt {
    question: String,
    reply: oneshot::Sender<Key>,
}

struct Relay {
    /// Gone when the command is.
    pty: Option<OwnedFd>,
    real: Arc<Real>,
    paused: Arc<AtomicBool>,
    requests: mpsc::Receiver<Request>,
    woken: PipeReader,
    /// Keys on their way to the command.
    typed: VecDeque<u8>,
    /// The command's output while a question is shown.
    held: Vec<u8>,
    /// The first is shown.
    prompts: VecDeque<Prompt>,
    /// When the first question was shown.
    shown_at: Option<Instant>,
    /// The cursor is at the start of a line.
    at_line_start: bool,
    keyboard_gone: bool,
    finishing: bool,
}

impl Relay {
    fn run(mut self) {
        loop {
            if !self.take_requests() {
                return;
            }
            self.look_at_prompts();
            if self.pty.is_none() && self.finishing {
                return;
            }
            match self.wait() {
                Ok(ready) => {
                    if ready.woken {
                        let mut scratch = [0; 64];
                        while matches!(self.woken.read(&mut scratch), Ok(n) if n > 0) {}
                    }
                    if ready.output {
                        self.read_output();
                    }
                    if ready.input {
                        self.read_input();
                    }
                    self.write_typed();
                }
                Err(Errno::EINTR) => {}
                // Nothing can be relayed any more; questions end unanswered.
                Err(_) => return,
            }
        }
    }

    /// Does what was asked; false when it is to end.
    fn take_requests(&mut self) -> bool {
        loop {
            match self.requests.try_recv() {
                Ok(Request::Prompt { question, reply }) => {
                    let answerable = self.real.has_keyboard() && !self.keyboard_gone && self.pty.is_some();
                    if answerable && self.prompts.len() < MAX_PROMPTS {
                        self.prompts.push_back(Prompt { question, reply });
                    }
                }
                Ok(Request::Say(line)) => self.say(&line),
                Ok(Request::TypeIn(bytes)) => {
                    let room = MAX_TYPED_BYTES.saturating_sub(self.typed.len());
                    self.typed.extend(bytes.into_iter().take(room));
                    self.write_typed();
                }
                Ok(Request::Finish) => self.finishing = true,
                Ok(Request::Stop) | Err(mpsc::TryRecvError::Disconnected) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
            }
        }
    }

    /// Ends questions that nobody waits for any more, and shows the next.
    fn look_at_prompts(&mut self) {
        if self.shown_at.is_some()
            && self
                .prompts
                .front()
                .is_some_and(|prompt| prompt.reply.is_closed())
        {
            self.end_prompt("");
        }
        self.prompts.retain(|prompt| !prompt.reply.is_closed());
        if self.shown_at.is_none() {
            match self.prompts.front().map(|prompt| prompt.question.clone()) {
                Some(question) => {
                    // What has been typed so far was typed for the command.
                    if self.may_read_keys() && self.input_is_ready() {
                        self.read_input();
                    }
                    self.start_line();
                    self.print(question.as_bytes());
                    self.at_line_start = false;
                    self.shown_at = Some(Instant::now());
                }
                None => self.release(),
            }
        }
    }

    /// Takes the shown question from the screen's last line.
    fn end_prompt(&mut self, answer: &str) -> Option<Prompt> {
        self.shown_at = None;
        self.print(answer.as_bytes());
        self.print(b"\r\n");
        self.at_line_start = true;
        self.prompts.pop_front()
    }

    /// Shows the output that waited.
    fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.show(&held);
    }

    fn say(&mut self, line: &str) {
        // With a question on the screen, the line goes above a repetition of it.
        self.start_line();
        for line in line.lines() {
            self.print(line.as_bytes());
            self.print(b"\r\n");
        }
        self.at_line_start = true;
        if self.shown_at.is_some()
            && let Some(question) = self.prompts.front().map(|prompt| prompt.question.clone())
        {
            self.print(question.as_bytes());
            self.at_line_start = false;
        }
    }

    fn start_line(&mut self) {
        if !self.at_line_start {
            self.print(b"\r\n");
            self.at_line_start = true;
        }
    }

    fn may_read_keys(&self) -> bool {
        !self.keyboard_gone && !self.paused.load(Ordering::SeqCst) && self.typed.len() < MAX_TYPED_BYTES
    }

    /// Waits until there is something to do.
    fn wait(&self) -> nix::Result<Ready> {
        let mut fds = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
        let input = self.real.input().filter(|_| self.may_read_keys());
        let input_at = input.map(|fd| {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            fds.len() - 1
        });
        let output_at = self.pty.as_ref().map(|pty| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, self.held.len() < MAX_HELD_BYTES);
            flags.set(PollFlags::POLLOUT, !self.typed.is_empty());
            fds.push(PollFd::new(pty.as_fd(), flags));
            fds.len() - 1
        });
        poll(&mut fds, PollTimeout::NONE)?;
        let at = |index: Option<usize>| index.and_then(|i| fds[i].revents()).unwrap_or(PollFlags::empty());
        Ok(Ready {
            woken: !at(Some(0)).is_empty(),
            input: !at(input_at).is_empty(),
            // A hang-up is told whether it is asked for or not, and means that all must be read.
            output: at(output_at).intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR),
        })
    }

    fn input_is_ready(&self) -> bool {
        let Some(input) = self.real.input() else {
            return false;
        };
        let mut fds = [PollFd::new(input, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn read_output(&mut self) {
        let Some(pty) = &self.pty else { return };
        let mut chunk = [0; CHUNK_BYTES];
        match nix::unistd::read(pty, &mut chunk) {
            Ok(length) if length > 0 => {
                if self.shown_at.is_some() {
                    self.held.extend_from_slice(&chunk[..length]);
                } else {
                    self.show(&chunk[..length]);
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // EIO: the last process that had the pty open is gone. Nobody is left to ask for.
            Ok(_) | Err(_) => {
                self.pty = None;
                if self.shown_at.is_some() {
                    self.end_prompt("");
                }
                self.prompts.clear();
                self.release();
            }
        }
    }

    fn read_input(&mut self) {
        let Some(input) = self.real.input() else { return };
        let mut chunk = [0; 1024];
        match nix::unistd::read(input, &mut chunk) {
            Ok(length) if length > 0 => self.take_keys(&chunk[..length]),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // The terminal was closed; the kernel tells this process with SIGHUP.
            Ok(_) | Err(_) => {
                self.keyboard_gone = true;
                if self.shown_at.is_some() {
                    self.end_prompt("");
                }
                self.prompts.clear();
            }
        }
    }

    /// The first key answers the question that is shown long enough; all others are the command's.
    fn take_keys(&mut self, bytes: &[u8]) {
        let asked = self.shown_at.is_some_and(|shown| shown.elapsed() >= GRACE);
        let mut rest = bytes;
        if asked && let Some((key, length)) = first_key(bytes) {
            rest = &bytes[length..];
            let echo = match key {
                Key::Char(character) if !character.is_control() => character.to_string(),
                _ => String::new(),
            };
            if let Some(prompt) = self.end_prompt(&echo) {
                let _ = prompt.reply.send(key);
            }
            // What follows in one read was pasted, or held down. It was not meant for the command.
            if !rest.is_empty() {
                rest = &[];
            }
        }
        self.typed.extend(rest);
    }

    /// Gives the command as many of its keys as it takes.
    fn write_typed(&mut self) {
        let Some(pty) = &self.pty else {
            self.typed.clear();
            return;
        };
        while !self.typed.is_empty() {
            match nix::unistd::write(pty, self.typed.as_slices().0) {
                Ok(length) => drop(self.typed.drain(..length)),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Shows output of the command.
    fn show(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.print(bytes);
            self.at_line_start = *last == b'\n';
        }
    }

    /// Writes all of it to the real terminal; what a terminal that is gone does not take is lost.
    fn print(&self, mut bytes: &[u8]) {
        let output = self.real.output();
        while !bytes.is_empty() {
            match nix::unistd::write(output, bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(Errno::EINTR) => {}
                // Somebody else made it non-blocking.
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(output, PollFlags::POLLOUT)];
                    if !matches!(poll(&mut fds, PollTimeout::NONE), Ok(_) | Err(Errno::EINTR)) {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

struct Ready {
    woken: bool,
    input: bool,
    output: bool,
}

fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
