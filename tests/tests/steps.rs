//! T55: the controlplane is killed at every step of its conversation with a dataplane, before the message gets to the
//! other side and after it, and again while what was killed is made good. Whatever the step, nothing opens without a
//! yes, nothing is asked twice, what is allowed gets through in the end, and what was taken back does not.
#![cfg(target_os = "linux")]
#![allow(clippy::print_stdout, reason = "a failure is read beside the steps before it")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use vnet_tests::wire::Passes;
use vnet_tests::{
    Answer, Controlplane, Cut, Dns, Running, Server, Wire, World, eventually, http, id, staged,
};

/// A flow by its name, one by its address, one that is refused; port 82 is asked for.
const POLICY: &str = "\
version: 1
rules:
  - {name: named, action: allow, domains: [web.example.com]}
  - {name: allowed, action: allow, cidr: 203.0.113.10/32, ports: [80]}
  - {name: denied, action: deny, cidr: 203.0.113.10/32, ports: [81]}
";
const NAMED: u32 = 8080;
const ALLOWED: u32 = 80;
const DENIED: u32 = 81;
const ASKED: u32 = 82;
const ASKED_FOR: &str = "203.0.113.10:82";
const ASKED_ADDRESS: &str = "203.0.113.10";
/// More steps than any conversation here has.
const STEPS_MAX: usize = 60;
/// What every conversation has from its beginning to its end.
const ALWAYS: [&str; 8] = [
    "Connection",
    "Hello",
    "Welcome",
    "Miss",
    "Verdict",
    "FlowOpened",
    "FlowClosed",
    "VmDown",
];

#[test]
fn killed_before_each_message() {
    staged(killed_before_each_message, |world| {
        let met = walk(world, fetches, None, Passes::No);
        met.has(&["VmUp", "VmSettings", "Binding", "Held", "Revoke", "Ack"]);
    });
}

#[test]
fn killed_after_each_message() {
    staged(killed_after_each_message, |world| {
        let met = walk(world, fetches, None, Passes::Yes);
        met.has(&["VmUp", "VmSettings", "Binding", "Held", "Revoke", "Ack"]);
    });
}

#[test]
fn killed_again_before_each_message_that_makes_a_kill_good() {
    staged(killed_again_before_each_message_that_makes_a_kill_good, |world| {
        let held = Cut::Kind("Held".to_owned(), Passes::Yes);
        let met = walk(world, fetches, Some(held), Passes::No);
        met.has(&["Held", "Revoke", "Ack"]);
    });
}

#[test]
fn killed_before_each_message_while_a_grant_is_taken_back() {
    staged(killed_before_each_message_while_a_grant_is_taken_back, |world| {
        let met = walk(world, is_taken_back, None, Passes::No);
        met.has(&["Revoke", "Cut", "Ack", "Held"]);
    });
}

#[test]
fn killed_after_each_message_while_a_grant_is_taken_back() {
    staged(killed_after_each_message_while_a_grant_is_taken_back, |world| {
        let met = walk(world, is_taken_back, None, Passes::Yes);
        met.has(&["Revoke", "Cut", "Ack", "Held"]);
    });
}

/// One after another. A resolver asks again where it is told that it failed; each page is held for as long as it takes,
/// and fetched again only where a connection was cut.
const FETCHES: &str = "\
fetch() { curl -sS --max-time 25 \"$@\" >/dev/null 2>&1; echo \"$what $?\"; }
for try in 1 2 3 4 5; do
  A=$(dig +short +tries=1 +time=10 @192.168.127.1 web.example.com) && [ \"$A\" = 198.51.100.7 ] && break
done
what=named; fetch --resolve web.example.com:8080:$A http://web.example.com:8080/
what=allowed; fetch http://203.0.113.10/
what=denied; fetch http://203.0.113.10:81/
for what in asked again; do
  for try in 1 2 3; do told=$(fetch http://203.0.113.10:82/); [ \"$told\" = \"$what 0\" ] && break; done; echo $told
done
";
/// curl: 0 for a page, 7 for a refused connection.
const FETCHED: &str = "named 0\nallowed 0\ndenied 7\nasked 0\nagain 0\n";

/// A lookup and a flow by its name, one that a rule allows, one that a rule denies, and one that a person allows.
fn fetches(mut talk: Conversation<'_>) -> Told {
    talk.plays(FETCHES, |talk| {
        if talk.guest_said("denied") {
            talk.answer("approve");
        }
    });
    assert_eq!(talk.guest_says(), FETCHED, "{}", talk.told());
    let [named, allowed, denied, asked] = talk.opened();
    assert_eq!((named, allowed, denied), (1, 1, 0), "{}", talk.told());
    // An answer that was killed on its way to the disk is as if it had not been given: what it opened is cut.
    assert!(
        asked == 2 || (asked > 2 && talk.killed_at_an_answer),
        "{}",
        talk.told()
    );
    talk.ends("ACTION_ALLOW")
}

const DRIPS: &str = "\
until [ -e go ]; do sleep 0.02; done; rm go
curl -sSN http://203.0.113.10:82/drip 2>/dev/null | { head -c 1 >/dev/null; echo dripping; cat >/dev/null; }; echo cut
until [ -e stopped ]; do sleep 0.02; done; rm stopped
for what in refused again; do curl -sS --max-time 25 http://203.0.113.10:82/ >/dev/null 2>&1; echo $what $?; done
";

/// A transfer under a grant; the grant is revoked, and what is asked then gets a no that lasts.
fn is_taken_back(mut talk: Conversation<'_>) -> Told {
    let mut grant = None;
    let mut revoked = false;
    let mut is_told = false;
    talk.plays(DRIPS, |talk| {
        let Some(grants) = talk.list(&["grants", "list"]) else {
            return;
        };
        match &grant {
            None => match grants.first() {
                Some(made) => {
                    talk.answered = true;
                    talk.scene.world.file("go", "");
                    grant = Some(id(made));
                }
                // Refused until the VM is known, and where one was made that was not told of: the list says.
                None => {
                    talk.answered = true;
                    talk.try_say(&["allow", "tcp", ASKED_FOR, "--vm", "web", "--forever"]);
                }
            },
            Some(_) if !talk.guest_said("dripping") => {}
            Some(made) if grants.iter().any(|grant| id(grant) == *made) => {
                assert!(!revoked, "it is back: {grants:?}\n{}", talk.told());
                revoked = talk.say(&["grants", "revoke", made]).is_some();
            }
            Some(_) if !talk.guest_said("cut") => {}
            Some(_) => {
                if !is_told {
                    talk.scene.world.file("stopped", "");
                }
                is_told = true;
                revoked = true;
                talk.answer("deny");
            }
        }
    });
    let expected = "dripping\ncut\nrefused 7\nagain 7\n";
    assert_eq!(talk.guest_says(), expected, "{}", talk.told());
    assert_eq!(talk.opened(), [0, 0, 0, 1], "{}", talk.told());
    talk.ends("ACTION_DENY")
}

/// What came of one conversation, or of all.
#[derive(Default)]
struct Told {
    /// The messages at which the controlplane was killed, in turn.
    cuts: Vec<String>,
    /// The kinds of all messages.
    kinds: BTreeSet<String>,
}

impl Told {
    /// There was a kill at every kind of message that belongs to it.
    fn has(&self, also: &[&str]) {
        let expected = ALWAYS.iter().chain(also);
        let missed: Vec<_> = expected
            .filter(|kind| !self.cuts.iter().any(|cut| cut == *kind))
            .collect();
        assert!(missed.is_empty(), "no kill at {missed:?}, but at {:?}", self.cuts);
    }
}

/// Kills at step after step until a conversation has none left.
fn walk(world: &World, play: fn(Conversation<'_>) -> Told, first: Option<Cut>, passes: Passes) -> Told {
    let scene = Scene::new(world);
    let mut all = Told::default();
    let mut steps = 0;
    let mut killed_at = |cut: Cut| {
        let plan: Vec<Cut> = first.clone().into_iter().chain([cut]).collect();
        let began = Instant::now();
        steps += 1;
        let told = play(Conversation::start(&scene, steps, &plan));
        println!("{plan:?}: killed at {:?}, {:?}", told.cuts, began.elapsed());
        let last = (told.cuts.len() == plan.len()).then(|| told.cuts.last().cloned());
        (last.flatten(), told.kinds)
    };
    for step in 1.. {
        assert!(step <= STEPS_MAX, "a conversation of more than {STEPS_MAX} steps");
        let (cut, kinds) = killed_at(Cut::Step(step, passes));
        all.kinds.extend(kinds);
        match cut {
            Some(kind) => all.cuts.push(kind),
            None => break,
        }
    }
    // Two messages may come in either order, and what is first in one conversation be second in the next.
    for kind in all.kinds.clone() {
        if !all.cuts.contains(&kind) {
            all.cuts.extend(killed_at(Cut::Kind(kind, passes)).0);
        }
    }
    all
}

/// What all conversations share.
struct Scene<'a> {
    world: &'a World,
    servers: [Server; 4],
    /// A store that has the policy and nothing else.
    store: PathBuf,
}

impl<'a> Scene<'a> {
    fn new(world: &'a World) -> Self {
        let internet = world.internet();
        let known = [("web.example.com", Answer::A("198.51.100.7"))];
        Dns::serve(internet, "203.0.113.10:53", &known);
        let policy = world.file("policy.yaml", POLICY);
        let controlplane = Controlplane::start(world, Signal::SIGTERM);
        world.vnetctl(&["policy", "apply", policy.to_str().unwrap()]);
        controlplane.end();
        let store = world.work().join("store.db");
        fs::rename(Controlplane::store(world), &store).unwrap();
        let servers = [
            format!("198.51.100.7:{NAMED}"),
            format!("203.0.113.10:{ALLOWED}"),
            format!("203.0.113.10:{DENIED}"),
            ASKED_FOR.to_owned(),
        ];
        Scene {
            world,
            servers: servers.map(|address| http(internet, &address)),
            store,
        }
    }

    fn connections(&self) -> [usize; 4] {
        std::array::from_fn(|server| self.servers[server].connections())
    }
}

/// One guest with its dataplane and controlplane, and a person who answers.
struct Conversation<'a> {
    scene: &'a Scene<'a>,
    wire: Wire,
    controlplane: Option<Controlplane>,
    dataplane: Running,
    vm_socket: PathBuf,
    guest: Option<Running>,
    /// Connections of those before it.
    before: [usize; 4],
    /// An answer was sent.
    answered: bool,
    /// It was heard that it is in force.
    in_force: bool,
    /// The controlplane was killed before it said whether an answer is in force.
    killed_at_an_answer: bool,
}

impl<'a> Conversation<'a> {
    fn start(scene: &'a Scene<'a>, number: usize, plan: &[Cut]) -> Self {
        let world = scene.world;
        let store = Controlplane::store(world);
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(format!("{}{suffix}", store.display()));
        }
        fs::copy(&scene.store, store).unwrap();
        let before = scene.connections();
        let at = |name: &str| world.runtime_dir().join(format!("{name}{number}.sock"));
        let upstream = world.runtime_dir().join("vnet/session.sock");
        let wire = Wire::listen(&at("wire"), &upstream, plan.to_vec());
        let controlplane = Controlplane::start(world, Signal::SIGKILL);
        wire.serves(controlplane.pid());
        let mut dataplane = world.program("vnet-dataplane");
        dataplane.args(["--vm", "web", "--controlplane"]);
        dataplane.arg(format!("unix://{}", at("wire").display()));
        dataplane.arg("--listen-qemu");
        dataplane.arg(format!("unix://{}", at("vm").display()));
        let dataplane = Running::start(dataplane);
        // So that the guest comes after the beginning, where there is one.
        eventually("the dataplane is greeted", || {
            wire.kinds().contains("Welcome") || !wire.is_served()
        });
        Conversation {
            scene,
            wire,
            controlplane: Some(controlplane),
            dataplane,
            vm_socket: at("vm"),
            guest: None,
            before,
            answered: false,
            in_force: false,
            killed_at_an_answer: false,
        }
    }

    /// Starts the guest, and has the person look again and again until it has ended.
    fn plays(&mut self, script: &str, mut look: impl FnMut(&mut Self)) {
        let mut guest = self.scene.world.load();
        guest.args(["guest", "--socket"]).arg(&self.vm_socket);
        guest.args(["--", "sh", "-c", script]);
        self.guest = Some(Running::start(guest));
        let began = Instant::now();
        while !self.guest.as_mut().is_none_or(Running::has_ended) {
            self.start_what_was_killed();
            self.nothing_opened_without_a_yes();
            look(self);
            assert!(began.elapsed() < PATIENCE, "{}", self.told());
            thread::sleep(Duration::from_millis(5));
        }
        self.nothing_opened_without_a_yes();
    }

    /// What is the same at every end: nobody else was asked for, the answer is in force, the dataplane lives.
    fn ends(mut self, action: &str) -> Told {
        assert!(self.answered, "{}", self.told());
        let held = self.wire.held();
        assert!(
            held.iter().all(|port| *port == ASKED),
            "{held:?}\n{}",
            self.told()
        );
        self.is_as_it_was_answered(action);
        assert!(!self.dataplane.has_ended(), "it is gone\n{}", self.told());

        // What is said at the end can be killed at, too.
        self.dataplane.signal(Signal::SIGTERM);
        eventually("the dataplane ends", || self.dataplane.has_ended());
        self.start_what_was_killed();
        self.is_as_it_was_answered(action);
        Told {
            cuts: self.wire.cuts(),
            kinds: self.wire.kinds(),
        }
    }

    /// How many connections each server got of this guest.
    fn opened(&self) -> [usize; 4] {
        let now = self.scene.connections();
        std::array::from_fn(|server| now[server] - self.before[server])
    }

    fn nothing_opened_without_a_yes(&self) {
        let opened = self.opened();
        let allowed = self.wire.allowed();
        for (opened, port) in opened.into_iter().zip([NAMED, ALLOWED, DENIED, ASKED]) {
            let may = allowed.contains(&port) && port != DENIED && (port != ASKED || self.answered);
            assert!(
                opened == 0 || may,
                "port {port} got a connection\n{}",
                self.told()
            );
        }
    }

    /// A person looks at what is asked, and answers it for ever.
    fn answer(&mut self, how: &str) {
        let Some(pending) = self.list(&["pending", "list"]) else {
            return;
        };
        assert!(pending.len() <= 1, "{pending:?}\n{}", self.told());
        let Some(request) = pending.first() else { return };
        assert!(!self.in_force, "asked again: {request}\n{}", self.told());
        let address = &request["target"]["address"];
        let asked = (address["prefix"].as_str(), address["ports"]["first"].as_u64());
        assert_eq!(asked, (Some(ASKED_ADDRESS), Some(ASKED.into())), "{request}");
        self.answered = true;
        self.in_force = self.say(&[how, &id(request), "--forever"]).is_some();
        self.killed_at_an_answer |= !self.in_force;
    }

    /// There is the one grant that was made, and nothing is asked. One that nobody was told of may be lost.
    fn is_as_it_was_answered(&mut self, action: &str) {
        let grants = self.insist(&["grants", "list"]);
        let is_it = match grants.as_slice() {
            [] => self.killed_at_an_answer && !self.in_force,
            [grant] => grant["action"] == action,
            _ => false,
        };
        assert!(is_it, "{grants:?}\n{}", self.told());
        let pending = self.insist(&["pending", "list"]);
        assert!(pending.is_empty(), "{pending:?}\n{}", self.told());
    }

    /// A list, of whichever controlplane there is.
    fn insist(&mut self, words: &[&str]) -> Vec<Value> {
        loop {
            self.start_what_was_killed();
            if let Some(list) = self.list(words) {
                return list;
            }
        }
    }

    /// A list, if the controlplane lives to print it.
    fn list(&self, words: &[&str]) -> Option<Vec<Value>> {
        let text = self.say(&[words, &["-o", "json"]].concat())?;
        Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }

    /// What `vnetctl` prints. `None`: it failed, as the controlplane was killed.
    fn say(&self, words: &[&str]) -> Option<String> {
        let ended = self.try_say(words);
        if ended.code == 0 {
            return Some(ended.stdout);
        }
        assert!(!self.wire.is_served(), "{words:?}: {ended:?}\n{}", self.told());
        None
    }

    /// `vnetctl`, which starts no controlplane.
    fn try_say(&self, words: &[&str]) -> vnet_tests::Ended {
        let server = format!("unix://{}", self.scene.world.control_socket().display());
        let words = [&["--server", &server], words].concat();
        self.scene.world.try_vnetctl(&words)
    }

    fn start_what_was_killed(&mut self) {
        if self.wire.is_served() {
            return;
        }
        if let Some(killed) = self.controlplane.take() {
            let started = killed.restart(self.scene.world);
            self.wire.serves(started.pid());
            self.controlplane = Some(started);
        }
    }

    fn guest_says(&self) -> String {
        self.guest.as_ref().map(Running::stdout).unwrap_or_default()
    }

    fn guest_said(&self, word: &str) -> bool {
        self.guest_says().lines().any(|line| line.starts_with(word))
    }

    /// What a reader of a failure wants to know.
    fn told(&self) -> String {
        format!(
            "answered: {}, in force: {}\n--- the session\n{}\n--- the guest\n{}\n--- the dataplane\n{}",
            self.answered,
            self.in_force,
            self.wire.log(),
            self.guest_says(),
            self.dataplane.stderr()
        )
    }
}

/// How long one conversation may take, kills and all.
const PATIENCE: Duration = Duration::from_secs(40);
