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

use super::keys::{Input, Key, Keys};
use super::output::{Filter, Size};
use super::tty::Real;
use super::{GRACE, MAX_HELD_BYTES};

/// Keys that may wait for the command; the real terminal keeps the rest.
const MAX_TYPED_BYTES: usize = 64 * 1024;
/// Questions that may wait for the one that is shown; further ones are not asked.
const MAX_PROMPTS: usize = 64;
/// Lines of vnet's own that may wait for the end of a program that has the whole screen.
const MAX_LINES: usize = 100;
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
    /// The size of the terminal, where a row of it can be reserved.
    Resize(Option<Size>),
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
    mark: String,
    reserve: Option<Size>,
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
        mark,
        filter: Filter::new(reserve),
        keys: Keys::default(),
        lines: VecDeque::new(),
        prompts: VecDeque::new(),
        shown_at: None,
        wanted: false,
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
    /// What vnet's own lines begin with.
    mark: String,
    /// Between the command's output and the terminal.
    filter: Filter,
    keys: Keys,
    /// Said while a program had the whole screen.
    lines: VecDeque<String>,
    /// The first is shown.
    prompts: VecDeque<Prompt>,
    /// When the first question was shown.
    shown_at: Option<Instant>,
    /// The user has asked for the question, under a program that has the whole screen.
    wanted: bool,
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
                Ok(Request::Resize(reserve)) => {
                    let drawn = self.filter.resize(reserve);
                    self.print(drawn.as_bytes());
                    self.show_question();
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
        if self.shown_at.is_some() {
            return;
        }
        if self.prompts.is_empty() {
            self.wanted = false;
            self.release();
        } else if self.filter.canvas().is_none() || self.wanted {
            // What has been typed so far was not typed for this question. What cannot be thrown away is read
            // within the grace.
            self.real.discard_input();
            self.shown_at = Some(Instant::now());
            self.start_line();
            self.show_question();
        } else {
            self.release();
        }
        self.draw_row();
    }

    /// Shows the first question, if it is to be seen.
    fn show_question(&mut self) {
        if self.shown_at.is_none() {
            return;
        }
        let Some(question) = self.prompts.front().map(|prompt| prompt.question.clone()) else {
            return;
        };
        let question = format!("{} {question}", self.mark);
        let shown = match self.filter.canvas() {
            None => {
                self.at_line_start = false;
                Some(question)
            }
            Some(canvas) => canvas.cover(&question),
        };
        match shown {
            Some(shown) => self.print(shown.as_bytes()),
            // Nobody answers what he cannot read whole.
            None => {
                self.shown_at = None;
                self.wanted = false;
            }
        }
    }

    /// Says in the row below a program that has the whole screen what there is to say.
    fn draw_row(&mut self) {
        let first = self.prompts.front().map(|prompt| prompt.question.clone());
        let row = match (first, self.lines.back()) {
            (Some(question), _) => format!("{} Ctrl-] answers: {question}", self.mark),
            (None, Some(line)) => format!("{} {line}", self.mark),
            (None, None) => format!("{} vnet", self.mark),
        };
        let covered = self.shown_at.is_some();
        let Some(canvas) = self.filter.canvas() else {
            return;
        };
        canvas.set_row(&row);
        if !covered {
            let mut shown = String::new();
            canvas.draw(&mut shown);
            self.print(shown.as_bytes());
        }
    }

    /// Takes the shown question from the screen.
    fn end_prompt(&mut self, answer: &str) -> Option<Prompt> {
        self.shown_at = None;
        match self.filter.canvas() {
            None => {
                self.print(answer.as_bytes());
                self.print(b"\r\n");
                self.at_line_start = true;
                self.give_back();
            }
            Some(canvas) => {
                let drawn = canvas.redraw();
                self.print(drawn.as_bytes());
            }
        }
        self.prompts.pop_front()
    }

    /// Shows the output that waited.
    fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.show(&held);
    }

    fn say(&mut self, line: &str) {
        if self.filter.canvas().is_some() {
            self.lines.extend(line.lines().map(str::to_owned));
            let over = self.lines.len().saturating_sub(MAX_LINES);
            self.lines.drain(..over);
            return;
        }
        // With a question on the screen, the line goes above a repetition of it.
        self.start_line();
        for line in line.lines() {
            self.print(format!("{} {line}\r\n", self.mark).as_bytes());
        }
        self.at_line_start = true;
        if self.shown_at.is_some() {
            self.show_question();
        } else {
            self.give_back();
        }
    }

    /// Takes the terminal from the command, and begins a line.
    fn start_line(&mut self) {
        if self.filter.canvas().is_some() {
            return;
        }
        if !self.at_line_start {
            self.print(b"\r\n");
            self.at_line_start = true;
        }
        let plain = self.filter.plain(self.real.rows());
        self.print(plain.as_bytes());
    }

    /// Gives the terminal back to the command, as that had it.
    fn give_back(&mut self) {
        let own = self.filter.own();
        self.print(own.as_bytes());
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
                let left = self.filter.finish();
                self.print(left.as_bytes());
                for line in std::mem::take(&mut self.lines) {
                    self.say(&line);
                }
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

    /// A key that comes alone answers the question that is shown long enough. While one is shown no other key
    /// goes anywhere; what the terminal answers to the command is the command's.
    fn take_keys(&mut self, bytes: &[u8]) {
        let inputs = self.keys.feed(bytes);
        let Some(shown) = self.shown_at else {
            let opens = self.filter.canvas().is_some() && !self.prompts.is_empty();
            if opens && inputs.contains(&Input::Key(Key::Open)) {
                self.wanted = true;
            } else {
                self.typed.extend(bytes);
            }
            return;
        };
        let mut pressed = Vec::new();
        for input in inputs {
            match input {
                Input::Key(key) => pressed.push(key),
                Input::Reply(bytes) => self.typed.extend(bytes),
                Input::Noise => {}
            }
        }
        // Several at once were pasted, or held down.
        let [key] = pressed.as_slice() else { return };
        if shown.elapsed() < GRACE {
            // To interrupt is never an answer, and may be urgent.
            if *key == Key::Interrupt {
                self.typed.push_back(CONTROL_C);
            }
            return;
        }
        if *key == Key::Open && self.filter.canvas().is_some() {
            return self.put_off();
        }
        let echo = match key {
            Key::Char(character) if !character.is_control() => character.to_string(),
            _ => String::new(),
        };
        if let Some(prompt) = self.end_prompt(&echo) {
            let _ = prompt.reply.send(*key);
        }
    }

    /// Leaves the question for later.
    fn put_off(&mut self) {
        self.wanted = false;
        if let Some(prompt) = self.end_prompt("") {
            self.prompts.push_front(prompt);
        }
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
        let Some(last) = bytes.last() else { return };
        let whole_before = self.filter.canvas().is_some();
        let passed = self.filter.feed(bytes);
        self.print(passed.shown.as_bytes());
        let room = MAX_TYPED_BYTES.saturating_sub(self.typed.len());
        self.typed.extend(passed.answers.bytes().take(room));
        self.at_line_start = *last == b'\n';
        let whole = self.filter.canvas().is_some();
        if whole {
            self.draw_row();
        } else if whole_before {
            for line in std::mem::take(&mut self.lines) {
                self.say(&line);
            }
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

const CONTROL_C: u8 = 0x03;

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
