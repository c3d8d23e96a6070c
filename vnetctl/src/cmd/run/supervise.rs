//! A run while it lasts: the guest and its command, the dataplane that serves it, the terminal, and the
//! questions.
//!
//! The order of the start is what makes errors clean: the namespaces first, then the dataplane, then
//! the controlplane must know the VM, and only then does the command start. The order of the end is the
//! reverse. If this process is killed instead, the guest dies with it by its own doing, and the
//! dataplane by its lifeline.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use ipnet::Ipv6Net;
use nix::sys::signal::{Signal, raise};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use vnet_proto::v1;

use super::{Plan, named_sockets, not_filtered};
use crate::client::{Connection, INSIDE_RUN};
use crate::cmd::attend::{Attendant, Seen, command_line, look, send_answer};
use crate::cmd::questions::{Act, Questions};
use crate::failure::{Failure, with_causes};
use crate::launch::{Dataplane, own_directories, own_programs};
use crate::output::{self, text::safe};
use crate::sandbox::{self, Event, Exit, Remote, Sandbox, Spec};
use crate::terminal::{Key, Terminal, standard_streams};

/// Runs the plan to its end; gives the command's exit code.
pub(super) fn run(plan: Plan, connection: Connection) -> Result<u8, Failure> {
    crate::cli::runtime()?.block_on(supervise(plan, connection))
}

async fn supervise(plan: Plan, connection: Connection) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    // Started by now, so that its directories exist and can be hidden from the command.
    connection.open().await?;
    let spec = Spec {
        mtu_bytes: plan.mtu_bytes,
        ipv6: plan.ipv6.and_then(ipv6_of),
        masks: masks(&connection),
        programs: own_programs(),
        writable: plan.writable.clone(),
        sockets: plan.sockets,
        pty: standard_streams(),
        env: vec![(INSIDE_RUN.into(), "1".into())],
        ..Spec::new(plan.command)
    };
    let mut guest = sandbox::spawn(&spec).map_err(|e| Failure::Run(with_causes(&e)))?;
    for note in &guest.notes {
        tracing::debug!(note = %safe(note), "guest");
    }
    let link = guest.link.take().map(|link| link.fd);
    let mut dataplane = Dataplane::start(crate::launch::Settings {
        link,
        ..plan.settings
    })
    .map_err(|e| Failure::Run(e.to_string()))?;
    let mut attendant = Attendant::start(connection.clone(), plan.dataplane);
    let mut waiting = Vec::new();
    let vm = tokio::select! {
        vm = attached(&mut attendant, &mut waiting) => vm,
        error = dataplane.ended() => return Err(Failure::Run(error.to_string())),
        signal = signals.next_end() => {
            drop(guest);
            dataplane.stop().await;
            return Ok(SIGNAL_CODE_BASE.wrapping_add(signal as u8));
        }
        () = tokio::time::sleep(ATTACH_PATIENCE) => {
            drop(guest);
            dataplane.stop().await;
            return Err(Failure::Run(format!(
                "the controlplane at {} does not know of the VM after {} s",
                connection.server()?,
                ATTACH_PATIENCE.as_secs()
            )));
        }
    };

    let terminal = match guest.pty.take().map(Terminal::attach) {
        Some(Ok(terminal)) => Some(terminal),
        Some(Err(error)) => {
            drop(guest);
            dataplane.stop().await;
            return Err(Failure::Run(format!("cannot use the terminal: {error}")));
        }
        None => None,
    };
    let voice = Voice {
        terminal: terminal.as_ref(),
    };
    if let Some(terminal) = &terminal {
        // For a person; a script's stderr is the command's.
        terminal.say(&format!(
            "vnet: its own lines begin with {}; {}",
            terminal.mark(),
            not_filtered(plan.writable.as_deref())
        ));
    }
    if vm != plan.vm {
        voice.say(&format!(
            "vnet: {} is taken; this run's VM is {}",
            safe(&plan.vm),
            safe(&vm)
        ));
    }
    let questions = Questions::new(
        terminal.as_ref().is_some_and(Terminal::can_prompt),
        command_line(&connection),
    );
    let (told, tells) = mpsc::channel(ANSWERS_MAX);
    let mut run = Run {
        voice: &voice,
        connection,
        gateway: spec.gateway,
        questions,
        prompt: None,
        told,
    };
    let result = match guest.start() {
        Ok(()) => {
            run.attend(
                &mut guest,
                &mut dataplane,
                &mut attendant,
                waiting,
                tells,
                &mut signals,
            )
            .await
        }
        Err(error) => Err(Failure::Run(with_causes(&error))),
    };
    drop(run);
    if let Some(terminal) = terminal {
        terminal.finish().await;
    }
    drop(guest);
    dataplane.stop().await;
    let exit = result?;
    if let Some(reason) = &exit.reason {
        return Err(match exit.code {
            sandbox::EXIT_NOT_FOUND => Failure::NotFound(safe(reason).into_owned()),
            sandbox::EXIT_CANNOT_EXECUTE => Failure::NotExecutable(safe(reason).into_owned()),
            _ => Failure::Run(safe(reason).into_owned()),
        });
    }
    Ok(exit.code)
}

/// Waits until the controlplane knows the VM and its link is there; what was seen meanwhile is kept.
async fn attached(attendant: &mut Attendant, waiting: &mut Vec<Seen>) -> String {
    loop {
        match attendant.next().await {
            Seen::Vm(vm) if vm.state() == v1::VmState::Attached => return vm.name,
            seen => waiting.push(seen),
        }
    }
}

/// The command's address in a prefix, the first that is not the gateway's, and the gateway's.
fn ipv6_of(prefix: Ipv6Net) -> Option<(Ipv6Net, Ipv6Addr)> {
    let host = |n: u128| Ipv6Addr::from_bits(prefix.network().to_bits() | n);
    let address = Ipv6Net::new(host(2), prefix.prefix_len()).ok()?;
    Some((address, host(1)))
}

/// What the command must not see: sockets that would let it answer its own questions, and the state.
fn masks(connection: &Connection) -> Vec<PathBuf> {
    let mut masks = own_directories();
    masks.extend(named_sockets(connection));
    masks.retain(|path| path.exists());
    masks
}

/// Where vnet's own lines go: past the command's output, not into it.
struct Voice<'a> {
    terminal: Option<&'a Terminal>,
}

impl Voice<'_> {
    fn say(&self, line: &str) {
        match self.terminal {
            Some(terminal) => terminal.say(line),
            None => output::say(line),
        }
    }
}

/// A question at the prompt.
struct Prompt<'a> {
    id: String,
    key: Pin<Box<dyn Future<Output = Option<Key>> + 'a>>,
}

struct Run<'a> {
    voice: &'a Voice<'a>,
    connection: Connection,
    gateway: Ipv4Addr,
    questions: Questions,
    prompt: Option<Prompt<'a>>,
    told: mpsc::Sender<Told>,
}

/// What the controlplane said to this run's own calls.
enum Told {
    /// An answer to a question was taken, or refused with a sentence.
    Answered(String, Option<String>),
    /// All about a question.
    Looked(Box<v1::PendingRequest>),
}

impl<'a> Run<'a> {
    /// Until the command ends, or the dataplane does.
    async fn attend(
        &mut self,
        guest: &mut Sandbox,
        dataplane: &mut Dataplane,
        attendant: &mut Attendant,
        waiting: Vec<Seen>,
        mut told: mpsc::Receiver<Told>,
        signals: &mut Signals,
    ) -> Result<Exit, Failure> {
        for seen in waiting {
            self.claim(guest, &seen).await;
            self.seen(seen);
        }
        loop {
            tokio::select! {
                event = guest.event() => match event {
                    Event::Exited(exit) => return Ok(exit),
                    Event::Stopped(_) => self.suspend(guest),
                },
                error = dataplane.ended() => return Err(Failure::Run(error.to_string())),
                seen = attendant.next() => {
                    self.claim(guest, &seen).await;
                    self.seen(seen);
                }
                key = pressed(&mut self.prompt) => self.pressed(key),
                Some(told) = told.recv() => {
                    let acts = match told {
                        Told::Answered(id, refused) => self.questions.answered(&id, refused),
                        Told::Looked(request) => self.questions.looked(&request, SystemTime::now()),
                    };
                    self.act(acts);
                }
                number = signals.next() => self.signalled(guest, number),
            }
        }
    }

    /// Finds out which program is behind a question that is new.
    async fn claim(&mut self, guest: &mut Sandbox, seen: &Seen) {
        let Seen::Pending(change) = seen else { return };
        let Some(request) = &change.request else { return };
        if request.state() != v1::PendingState::Open || !self.questions.is_news(request) {
            return;
        }
        if let Some(remote) = remote(request, self.gateway) {
            let programs = guest.owners(remote).await;
            self.questions.claim(&request.id, &programs);
        }
    }

    fn seen(&mut self, seen: Seen) {
        let acts = match seen {
            Seen::Began => self.questions.begin_again(),
            Seen::Pending(change) => self.questions.change(&change),
            Seen::Vm(_) | Seen::Gone(_) | Seen::Synced => Vec::new(),
            Seen::Lost(why) => {
                let line = format!(
                    "vnet: no controlplane, so nothing new is let out; trying again ({})",
                    safe(&why)
                );
                self.voice.say(&line);
                Vec::new()
            }
        };
        self.act(acts);
    }

    fn act(&mut self, acts: Vec<Act>) {
        for act in acts {
            match act {
                Act::Say(line) => self.voice.say(&line),
                Act::Ask { id, text } => {
                    if let Some(terminal) = self.voice.terminal {
                        let key = Box::pin(async move { terminal.prompt(&text).await });
                        self.prompt = Some(Prompt { id, key });
                    }
                }
                Act::Withdraw { why, .. } => {
                    // Dropping it takes it off the screen.
                    self.prompt = None;
                    self.voice.say(&format!("vnet: {why}"));
                }
                Act::Answer { request, answer } => {
                    let (connection, told) = (self.connection.clone(), self.told.clone());
                    tokio::spawn(async move {
                        let id = request.id.clone();
                        let refused = send_answer(&connection, *request, answer).await.err();
                        let refused = refused.map(|failure| failure.to_string());
                        let _ = told.send(Told::Answered(id, refused)).await;
                    });
                }
                Act::Look { request } => {
                    let (connection, told) = (self.connection.clone(), self.told.clone());
                    tokio::spawn(async move {
                        // What is known already is better than nothing.
                        let looked = look(&connection, &request.id).await.unwrap_or(*request);
                        let _ = told.send(Told::Looked(Box::new(looked))).await;
                    });
                }
            }
        }
    }

    fn pressed(&mut self, key: Option<Key>) {
        let Some(Prompt { id, .. }) = self.prompt.take() else {
            return;
        };
        // Without a key none will come: the command has ended, or the terminal is gone.
        let Some(key) = key else { return };
        let key = match key {
            Key::Char(key) => key,
            // Meant for the command, which the question keeps from hearing it.
            Key::Interrupt => self.type_in(CONTROL_C),
            Key::Suspend => self.type_in(CONTROL_Z),
            Key::EndOfFile => self.type_in(CONTROL_D),
            Key::Enter | Key::Open | Key::Other => NO_KEY,
        };
        let acts = self.questions.pressed(&id, key);
        self.act(acts);
    }

    /// Gives the command a key; what is left for the question is none.
    fn type_in(&self, byte: u8) -> char {
        if let Some(terminal) = self.voice.terminal {
            terminal.type_in(&[byte]);
        }
        NO_KEY
    }

    /// The command was stopped, so this process stops too and the shell takes over; `fg` lets both go on.
    fn suspend(&self, guest: &Sandbox) {
        if let Some(terminal) = self.voice.terminal {
            terminal.pause();
        }
        let _ = raise(Signal::SIGSTOP);
        if let Some(terminal) = self.voice.terminal {
            terminal.resume();
        }
        let _ = guest.signal(nix::libc::SIGCONT);
    }

    fn signalled(&self, guest: &Sandbox, number: i32) {
        match number {
            nix::libc::SIGWINCH => {
                if let Some(terminal) = self.voice.terminal {
                    terminal.resize();
                }
                return;
            }
            nix::libc::SIGCONT => {
                if let Some(terminal) = self.voice.terminal {
                    terminal.resume();
                }
            }
            _ => {}
        }
        // If the guest is gone, its end is the next event.
        let _ = guest.signal(number);
    }
}

/// Where a socket leads that is behind such a request, if one can be told by it.
fn remote(request: &v1::PendingRequest, gateway: Ipv4Addr) -> Option<Remote> {
    match request.target.as_ref()?.kind.as_ref()? {
        v1::target::Kind::Address(target) => {
            let tcp = match target.protocol() {
                v1::Protocol::Tcp => true,
                v1::Protocol::Udp => false,
                _ => return None,
            };
            let address = target.prefix.split('/').next()?.parse().ok()?;
            let port = u16::try_from(target.ports?.first).ok()?;
            Some(Remote {
                tcp,
                address: SocketAddr::new(address, port),
            })
        }
        // A lookup: whoever has the gateway's resolver at the other end.
        _ if !request.query_type.is_empty() => Some(Remote {
            tcp: false,
            address: SocketAddr::new(gateway.into(), DNS_PORT),
        }),
        _ => None,
    }
}

/// Waits for a key at the prompt; for ever where nothing is asked.
async fn pressed(prompt: &mut Option<Prompt<'_>>) -> Option<Key> {
    match prompt {
        Some(prompt) => prompt.key.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Signals that concern the command more than this process.
struct Signals {
    received: mpsc::Receiver<i32>,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let (sender, received) = mpsc::channel(SIGNALS_MAX);
        for number in PASSED_ON {
            let mut stream = signal(SignalKind::from_raw(number))
                .map_err(|e| Failure::Run(format!("cannot wait for signal {number}: {e}")))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(number).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { received })
    }

    /// The next one. Cancel safe.
    async fn next(&mut self) -> i32 {
        match self.received.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }

    /// The next one that asks for the end. Others are of no concern before the command has started.
    /// Cancel safe.
    async fn next_end(&mut self) -> i32 {
        loop {
            let number = self.next().await;
            if matches!(
                number,
                nix::libc::SIGHUP | nix::libc::SIGINT | nix::libc::SIGQUIT | nix::libc::SIGTERM
            ) {
                return number;
            }
        }
    }
}

const DNS_PORT: u16 = 53;
/// Passed on to the command, or to its terminal.
const PASSED_ON: [i32; 9] = [
    nix::libc::SIGHUP,
    nix::libc::SIGINT,
    nix::libc::SIGQUIT,
    nix::libc::SIGTERM,
    nix::libc::SIGUSR1,
    nix::libc::SIGUSR2,
    nix::libc::SIGTSTP,
    nix::libc::SIGCONT,
    nix::libc::SIGWINCH,
];
const SIGNALS_MAX: usize = 16;
/// Answers on their way back; one is given at a time.
const ANSWERS_MAX: usize = 4;
/// What a shell adds to a signal's number.
const SIGNAL_CODE_BASE: u8 = 128;
const CONTROL_C: u8 = 0x03;
const CONTROL_D: u8 = 0x04;
const CONTROL_Z: u8 = 0x1a;
/// No key that answers anything.
const NO_KEY: char = '\0';
/// The dataplane connects at once; a loaded machine may take seconds.
const ATTACH_PATIENCE: Duration = Duration::from_secs(15);
