//! The questions of one run: which are open, which one is at the prompt, what was said of each.
//!
//! A plain state machine: changes and keys in, [`Act`]s out. Where there is a prompt it asks one question
//! at a time, and takes it back when somebody else answers or the guest gives up; where there is none
//! it says each in a line. A guest can raise questions faster than a person reads, so what is said is
//! bounded.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use vnet_proto::v1;

use super::pending::{asks, details, guards, names};
use crate::output::text::safe;

/// Something to do for a question.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// Print a line.
    Say(String),
    /// Put this question at the prompt.
    Ask {
        /// The request's id.
        id: String,
        /// The prompt's text, one line.
        text: String,
    },
    /// Take the question at the prompt back.
    Withdraw {
        /// The request's id.
        id: String,
        /// Why, for the person who is looking at it.
        why: String,
    },
    /// Read all about it, what each answer would cover included, and give it to [`Questions::looked`].
    Look {
        /// What is known of it.
        request: Box<v1::PendingRequest>,
    },
    /// Send the answer. It carries the etag of what was shown.
    Answer {
        /// What was shown.
        request: Box<v1::PendingRequest>,
        /// What was answered.
        answer: Answer,
    },
}

/// What a person answers at the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Yes, until the VM stops.
    Yes,
    /// Yes, this once.
    Once,
    /// No, until the VM stops.
    No,
}

/// The open questions of one dataplane's VMs.
#[derive(Debug)]
pub struct Questions {
    /// Whether somebody can be asked at a prompt.
    prompts: bool,
    /// How `vnetctl` is to be called to answer, as `vnetctl` or `vnetctl --server URL`.
    command: String,
    open: BTreeMap<String, v1::PendingRequest>,
    /// Which programs are said to ask, for each that is open.
    claims: BTreeMap<String, String>,
    /// Those still to be asked, oldest first; may name some that are no longer open.
    waiting: VecDeque<String>,
    asked: Option<String>,
    /// Of each VM with a question that is open here.
    vms: BTreeMap<String, OfVm>,
    /// Whether it was said that more is asked, by more VMs than there is room for here.
    overflowed: bool,
}

/// What is known of one VM's questions.
#[derive(Debug, Default)]
struct OfVm {
    /// Those that are open here.
    open: usize,
    /// Whether it was said that it asks more.
    overflowed: bool,
}

impl Questions {
    /// No question yet.
    pub fn new(prompts: bool, command: String) -> Self {
        Self {
            prompts,
            command,
            open: BTreeMap::new(),
            claims: BTreeMap::new(),
            waiting: VecDeque::new(),
            asked: None,
            vms: BTreeMap::new(),
            overflowed: false,
        }
    }

    /// Whether this is a question that is not known yet, of which it may be told who asks.
    pub fn is_news(&self, request: &v1::PendingRequest) -> bool {
        !self.open.contains_key(&request.id) && self.has_room(&request.vm)
    }

    /// Which programs are said to ask a question that is about to come. It is shown, and decides nothing.
    pub fn claim(&mut self, id: &str, programs: &[String]) {
        if !programs.is_empty() && self.claims.len() < OPEN_MAX {
            self.claims.insert(id.to_owned(), programs.join(", "));
        }
    }

    /// A change of the pending requests.
    pub fn change(&mut self, change: &v1::WatchPendingResponse) -> Vec<Act> {
        let Some(request) = &change.request else {
            return Vec::new();
        };
        match change.change() {
            v1::PendingChange::Added | v1::PendingChange::Updated => self.opened(request),
            v1::PendingChange::Removed => self.ended(request),
            v1::PendingChange::Unspecified | v1::PendingChange::Synced | v1::PendingChange::Gap => Vec::new(),
        }
    }

    /// The watch begins anew: what it lists from here on is what is open.
    pub fn begin_again(&mut self) -> Vec<Act> {
        let asked = self.asked.take();
        self.open.clear();
        self.claims.clear();
        self.waiting.clear();
        self.vms.clear();
        self.overflowed = false;
        asked
            .map(|id| Act::Withdraw {
                id,
                why: "the controlplane went away".to_owned(),
            })
            .into_iter()
            .collect()
    }

    /// A key was pressed at the prompt for a question. One that is gone is not answered by it.
    pub fn pressed(&mut self, id: &str, key: char) -> Vec<Act> {
        if self.asked.as_deref() != Some(id) {
            return Vec::new();
        }
        let Some(request) = self.open.get(id).cloned() else {
            return Vec::new();
        };
        let answer = match key.to_ascii_lowercase() {
            'y' => Answer::Yes,
            'o' => Answer::Once,
            'n' => Answer::No,
            'd' => {
                return vec![Act::Look {
                    request: Box::new(request),
                }];
            }
            _ => return vec![self.ask(&request)],
        };
        // It stays open until the controlplane says that it is not: the answer may be refused.
        self.asked = None;
        vec![Act::Answer {
            request: Box::new(request),
            answer,
        }]
    }

    /// A question's details were read. It is asked again, unless it has ended meanwhile.
    pub fn looked(&mut self, request: &v1::PendingRequest, now: SystemTime) -> Vec<Act> {
        if self.asked.as_deref() != Some(&request.id) {
            return Vec::new();
        }
        let Some(asked) = self.open.get(&request.id) else {
            return Vec::new();
        };
        let lines = details(request, now);
        let shown = lines.iter().map(|(name, value)| {
            let colon = if name.is_empty() { "" } else { ": " };
            Act::Say(format!("  {name}{colon}{}", safe(value)))
        });
        shown.chain([self.ask(asked)]).collect()
    }

    /// An answer was sent and taken, or refused with a sentence.
    pub fn answered(&mut self, id: &str, refused: Option<String>) -> Vec<Act> {
        let mut acts = Vec::new();
        if let Some(sentence) = refused {
            acts.push(Act::Say(format!("vnet: not answered: {sentence}")));
            if self.open.contains_key(id) {
                self.waiting.push_front(id.to_owned());
            }
        }
        acts.extend(self.next());
        acts
    }

    fn opened(&mut self, request: &v1::PendingRequest) -> Vec<Act> {
        let id = &request.id;
        if let Some(known) = self.open.get_mut(id) {
            let changed = known.etag != request.etag;
            *known = request.clone();
            if changed && self.asked.as_deref() == Some(id) {
                let why = "what it asks has changed".to_owned();
                return vec![Act::Withdraw { id: id.clone(), why }, self.ask(request)];
            }
            return Vec::new();
        }
        if !self.has_room(&request.vm) {
            return self.overflow(&request.vm);
        }
        self.open.insert(id.clone(), request.clone());
        self.vms.entry(request.vm.clone()).or_default().open += 1;
        if self.prompts {
            self.waiting.push_back(id.clone());
            return self.next().into_iter().collect();
        }
        vec![Act::Say(self.line(request))]
    }

    /// Questions of one VM that are open here at most.
    fn of_vm_max(&self) -> usize {
        if self.prompts { OPEN_MAX } else { SAID_MAX }
    }

    fn has_room(&self, vm: &str) -> bool {
        self.open.len() < OPEN_MAX && self.vms.get(vm).map_or(0, |of| of.open) < self.of_vm_max()
    }

    fn ended(&mut self, request: &v1::PendingRequest) -> Vec<Act> {
        self.claims.remove(&request.id);
        let Some(known) = self.open.remove(&request.id) else {
            return Vec::new();
        };
        let of_vm_max = self.of_vm_max();
        if let Some(of) = self.vms.get_mut(&known.vm) {
            of.open = of.open.saturating_sub(1);
            // Not at each that ends: one who asks at the limit, again and again, would be told of as often.
            of.overflowed &= of.open > of_vm_max / 2;
            if of.open == 0 {
                self.vms.remove(&known.vm);
            }
        }
        self.overflowed &= self.open.len() > OPEN_MAX / 2;
        let mut acts = Vec::new();
        if self.asked.as_deref() == Some(&request.id) {
            self.asked = None;
            let why = format!("{}: {}", safe(&asks(request)), why_ended(request));
            acts.push(Act::Withdraw {
                id: request.id.clone(),
                why,
            });
            acts.extend(self.next());
        }
        acts
    }

    /// Puts the next question at the prompt, if nobody is looking at one.
    fn next(&mut self) -> Option<Act> {
        if self.asked.is_some() {
            return None;
        }
        while let Some(id) = self.waiting.pop_front() {
            if let Some(request) = self.open.get(&id) {
                let ask = self.ask(request);
                self.asked = Some(id);
                return Some(ask);
            }
        }
        None
    }

    fn overflow(&mut self, vm: &str) -> Vec<Act> {
        let (who, overflowed) = match self.vms.get_mut(vm) {
            Some(of) if self.open.len() < OPEN_MAX => (format!("{} asks more", safe(vm)), &mut of.overflowed),
            _ => ("more is asked".to_owned(), &mut self.overflowed),
        };
        if std::mem::replace(overflowed, true) {
            return Vec::new();
        }
        vec![Act::Say(format!(
            "vnet: {who} than is shown here; see: {} pending list",
            self.command
        ))]
    }

    /// For those who have no prompt.
    fn line(&self, request: &v1::PendingRequest) -> String {
        let Self { command, .. } = self;
        let id = safe(&request.id);
        format!(
            "vnet: {} (answer: {command} approve {id}, or {command} deny {id})",
            self.question(request)
        )
    }

    fn ask(&self, request: &v1::PendingRequest) -> Act {
        let Self { command, .. } = self;
        let id = safe(&request.id);
        let text = format!(
            "vnet: {}; [y]es until it stops, [o]nce, [n]o, [d]etails (or elsewhere: {command} approve {id})? ",
            self.question(request)
        );
        Act::Ask {
            id: request.id.clone(),
            text,
        }
    }

    /// What is asked and, as far as is known, by whom.
    fn question(&self, request: &v1::PendingRequest) -> String {
        match self.claims.get(&request.id) {
            Some(programs) => format!("{}, by {}", question(request), safe(programs)),
            None => question(request),
        }
    }
}

/// What is asked, in one line.
fn question(request: &v1::PendingRequest) -> String {
    let names = names(request);
    let names = if names.is_empty() {
        String::new()
    } else {
        format!(" ({names})")
    };
    let guards = guards(request);
    let guards = if guards.is_empty() {
        String::new()
    } else {
        format!(" [guarded: {}]", guards.join(", "))
    };
    let kind = request.target.as_ref();
    let kind = kind.and_then(|target| target.kind.as_ref());
    let word = match kind {
        // As "to open tcp 127.0.0.1:8080 to its port 80".
        Some(v1::target::Kind::Forward(_)) => "asks",
        _ => "asks for",
    };
    safe(&format!("{} {word} {}{names}{guards}", request.vm, asks(request))).into_owned()
}

fn why_ended(request: &v1::PendingRequest) -> String {
    match request.state() {
        v1::PendingState::Approved => "approved elsewhere".to_owned(),
        v1::PendingState::Denied => "denied elsewhere".to_owned(),
        v1::PendingState::Expired => "nobody answered in time".to_owned(),
        v1::PendingState::Cancelled => "the command gave up".to_owned(),
        v1::PendingState::Decided => "a rule or a grant decided it".to_owned(),
        v1::PendingState::Open | v1::PendingState::Unspecified => "no longer asked".to_owned(),
    }
}

/// Lines said for questions of one VM that are open together. `pending list` has them all.
const SAID_MAX: usize = 20;
/// Questions kept here, of all VMs. The controlplane keeps more; they are listed, and asked when they change.
const OPEN_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: &str, address: &str) -> v1::PendingRequest {
        v1::PendingRequest {
            id: id.to_owned(),
            etag: format!("{id}-1"),
            vm: "web".to_owned(),
            target: Some(v1::Target {
                kind: Some(v1::target::Kind::Address(v1::AddressTarget {
                    protocol: v1::Protocol::Tcp.into(),
                    prefix: address.to_owned(),
                    ports: Some(v1::PortRange { first: 80, last: 80 }),
                })),
            }),
            state: v1::PendingState::Open.into(),
            ..Default::default()
        }
    }

    fn added(request: &v1::PendingRequest) -> v1::WatchPendingResponse {
        v1::WatchPendingResponse {
            change: v1::PendingChange::Added.into(),
            request: Some(request.clone()),
        }
    }

    fn removed(request: &v1::PendingRequest, state: v1::PendingState) -> v1::WatchPendingResponse {
        let request = v1::PendingRequest {
            state: state.into(),
            ..request.clone()
        };
        v1::WatchPendingResponse {
            change: v1::PendingChange::Removed.into(),
            request: Some(request),
        }
    }

    fn questions(prompts: bool) -> Questions {
        Questions::new(prompts, "vnetctl".to_owned())
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    #[test]
    fn without_a_terminal_a_question_is_one_line_that_says_how_to_answer() {
        let mut questions = questions(false);
        let mut asked = request("p1", "10.0.0.1");
        asked.names = vec!["a.example".to_owned()];

        let acts = questions.change(&added(&asked));

        assert_eq!(
            acts,
            [Act::Say(
                "vnet: web asks for tcp 10.0.0.1:80 (a.example) (answer: vnetctl approve p1, or vnetctl deny p1)"
                    .to_owned()
            )]
        );
        assert_eq!(questions.change(&added(&asked)), [], "said once only");
    }

    #[test]
    fn one_question_is_at_the_prompt_at_a_time() {
        let mut questions = questions(true);
        let (first, second) = (request("p1", "10.0.0.1"), request("p2", "10.0.0.2"));

        let acts = questions.change(&added(&first));
        assert!(
            matches!(&acts[..], [Act::Ask { id, .. }] if id == "p1"),
            "{acts:?}"
        );
        assert_eq!(questions.change(&added(&second)), [], "it waits its turn");

        let acts = questions.pressed("p1", 'y');
        let expected = Act::Answer {
            request: Box::new(first.clone()),
            answer: Answer::Yes,
        };
        assert_eq!(acts, [expected]);
        assert_eq!(questions.change(&removed(&first, v1::PendingState::Approved)), []);
        let acts = questions.answered("p1", None);
        assert!(
            matches!(&acts[..], [Act::Ask { id, .. }] if id == "p2"),
            "{acts:?}"
        );
    }

    #[test]
    fn a_prompt_says_what_is_asked_and_how_to_answer_in_one_line() {
        let mut asked = request("p1", "10.0.0.1");
        asked.names = vec!["a\u{202e}.example".to_owned()];

        let acts = questions(true).change(&added(&asked));

        let Act::Ask { text, .. } = &acts[0] else {
            panic!("{acts:?}")
        };
        assert_eq!(
            text,
            "vnet: web asks for tcp 10.0.0.1:80 (a\\u{202e}.example); [y]es until it stops, [o]nce, [n]o, \
             [d]etails (or elsewhere: vnetctl approve p1)? "
        );
    }

    #[test]
    fn who_asks_is_shown_as_plain_text_and_forgotten_with_the_question() {
        let mut questions = questions(true);
        let asked = request("p1", "10.0.0.1");
        assert!(questions.is_news(&asked));
        questions.claim(
            "p1",
            &["cu\u{1b}[2Jrl (pid 7)".to_owned(), "node (pid 9)".to_owned()],
        );

        let acts = questions.change(&added(&asked));

        let Act::Ask { text, .. } = &acts[0] else {
            panic!("{acts:?}")
        };
        assert!(
            text.starts_with(
                "vnet: web asks for tcp 10.0.0.1:80, by cu\\u{1b}[2Jrl (pid 7), node (pid 9); [y]es"
            ),
            "{text}"
        );
        assert!(!questions.is_news(&asked));
        questions.change(&removed(&asked, v1::PendingState::Expired));
        assert!(questions.claims.is_empty());
    }

    #[test]
    fn a_question_answered_elsewhere_is_taken_back() {
        let mut questions = questions(true);
        let asked = request("p1", "10.0.0.1");
        questions.change(&added(&asked));

        let acts = questions.change(&removed(&asked, v1::PendingState::Denied));

        assert_eq!(
            acts,
            [Act::Withdraw {
                id: "p1".to_owned(),
                why: "tcp 10.0.0.1:80: denied elsewhere".to_owned()
            }]
        );
        assert_eq!(questions.pressed("p1", 'y'), [], "a late key answers nothing");
    }

    #[test]
    fn a_question_that_changed_is_shown_again_before_it_can_be_answered() {
        let mut questions = questions(true);
        let asked = request("p1", "10.0.0.1");
        questions.change(&added(&asked));
        let changed = v1::PendingRequest {
            etag: "p1-2".to_owned(),
            ..asked
        };

        let acts = questions.change(&added(&changed));
        assert!(
            matches!(&acts[..], [Act::Withdraw { .. }, Act::Ask { .. }]),
            "{acts:?}"
        );

        let acts = questions.pressed("p1", 'N');
        assert_eq!(
            acts,
            [Act::Answer {
                request: Box::new(changed),
                answer: Answer::No
            }]
        );
    }

    #[test]
    fn a_refused_answer_is_said_and_asked_again() {
        let mut questions = questions(true);
        let asked = request("p1", "10.0.0.1");
        questions.change(&added(&asked));
        questions.pressed("p1", 'y');

        let acts = questions.answered("p1", Some("it changed since".to_owned()));

        assert!(
            matches!(&acts[..], [Act::Say(said), Act::Ask { .. }] if said.contains("it changed since")),
            "{acts:?}"
        );
    }

    #[test]
    fn details_are_shown_and_the_question_stays() {
        let mut questions = questions(true);
        questions.change(&added(&request("p1", "10.0.0.1")));

        let acts = questions.pressed("p1", 'd');
        let [Act::Look { request: asked }] = &acts[..] else {
            panic!("{acts:?}")
        };
        let reach = v1::ScopeReach {
            vms: Some(v1::VmSelector {
                name: "web".to_owned(),
                ..Default::default()
            }),
            vm_count: 1,
            requests: 2,
            names: 0,
            past_flows: 1,
        };
        let option = v1::ScopeOption {
            scope: v1::Scope::HostPort.into(),
            target: asked.target.clone(),
            reaches: vec![reach],
        };
        let looked = v1::PendingRequest {
            options: vec![option],
            ..(**asked).clone()
        };
        let acts = questions.looked(&looked, now());

        assert!(
            matches!(acts.last(), Some(Act::Ask { id, .. }) if id == "p1"),
            "{acts:?}"
        );
        assert!(
            acts.contains(&Act::Say("  Asks: tcp 10.0.0.1:80".to_owned())),
            "{acts:?}"
        );
        let covers = "    for web (1 VM): 2 requests, 0 known names, 1 past flow";
        assert!(acts.contains(&Act::Say(covers.to_owned())), "{acts:?}");
    }

    #[test]
    fn details_of_a_question_that_ended_meanwhile_are_not_shown() {
        let mut questions = questions(true);
        let asked = request("p1", "10.0.0.1");
        questions.change(&added(&asked));
        questions.pressed("p1", 'd');
        questions.change(&removed(&asked, v1::PendingState::Cancelled));
        assert_eq!(questions.looked(&asked, now()), []);
    }

    /// Questions of one VM, as many.
    fn of_vm(vm: &str, count: usize) -> Vec<v1::PendingRequest> {
        let of_vm = |n| v1::PendingRequest {
            vm: vm.to_owned(),
            ..request(&format!("{vm}-{n}"), "10.0.0.1")
        };
        (0..count).map(of_vm).collect()
    }

    fn all_added(questions: &mut Questions, all: &[v1::PendingRequest]) -> Vec<String> {
        let acts = all.iter().flat_map(|r| questions.change(&added(r)));
        let line = |act| match act {
            Act::Say(line) => line,
            other => panic!("{other:?}"),
        };
        acts.map(line).collect()
    }

    #[test]
    fn a_vm_that_keeps_one_question_open_for_ever_silences_nobody() {
        let mut questions = questions(false);
        let kept = of_vm("kept", 1);
        assert_eq!(all_added(&mut questions, &kept).len(), 1);
        for n in 0..100 {
            let asked = request(&format!("p{n}"), "10.0.0.1");
            assert_eq!(
                all_added(&mut questions, std::slice::from_ref(&asked)).len(),
                1,
                "question {n}"
            );
            questions.change(&removed(&asked, v1::PendingState::Cancelled));
        }
    }

    #[test]
    fn one_vms_flood_is_said_once_and_leaves_room_for_the_others() {
        let mut questions = questions(false);
        let flood = of_vm("flood", SAID_MAX * 3);

        let said = all_added(&mut questions, &flood);
        assert_eq!(said.len(), SAID_MAX + 1);
        let overflow = "vnet: flood asks more than is shown here; see: vnetctl pending list";
        assert_eq!(said[SAID_MAX], overflow);

        let other = all_added(&mut questions, &of_vm("other", SAID_MAX));
        assert_eq!(other.len(), SAID_MAX);
        assert!(
            other.iter().all(|line| line.contains("other asks for")),
            "{other:?}"
        );
        // One of the flood's that ends makes room for one more, and the rest stays unsaid.
        questions.change(&removed(&flood[0], v1::PendingState::Expired));
        let more = all_added(&mut questions, &flood[SAID_MAX..SAID_MAX + 2]);
        assert!(
            matches!(&more[..], [line] if line.contains("flood asks for")),
            "{more:?}"
        );
        // Where half of it is gone, another flood is said again.
        for ended in &flood[..SAID_MAX / 2 + 1] {
            questions.change(&removed(ended, v1::PendingState::Expired));
        }
        let again = all_added(&mut questions, &of_vm("flood", SAID_MAX * 4)[SAID_MAX * 3..]);
        assert_eq!(again.last().map(String::as_str), Some(overflow));
    }

    #[test]
    fn what_many_vms_ask_is_bounded_together() {
        let mut questions = questions(false);
        let vms = OPEN_MAX / SAID_MAX;
        for n in 0..vms {
            assert_eq!(
                all_added(&mut questions, &of_vm(&format!("vm{n}"), SAID_MAX)).len(),
                SAID_MAX
            );
        }

        let more = all_added(&mut questions, &of_vm("more", 5));

        assert_eq!(
            more,
            ["vnet: more is asked than is shown here; see: vnetctl pending list"]
        );
        assert_eq!(questions.open.len(), OPEN_MAX);
        assert_eq!(
            questions.vms.len(),
            vms,
            "a VM without a question here is not kept"
        );
    }

    #[test]
    fn a_new_controlplane_begins_with_nothing_said() {
        let mut questions = questions(false);
        let flood = of_vm("flood", SAID_MAX + 1);
        assert_eq!(all_added(&mut questions, &flood).len(), SAID_MAX + 1);

        assert_eq!(questions.begin_again(), []);

        assert_eq!(
            all_added(&mut questions, &flood).len(),
            SAID_MAX + 1,
            "the flood is said again too"
        );
    }

    #[test]
    fn what_is_said_is_bounded_however_much_is_asked() {
        let mut questions = questions(false);
        let all: Vec<_> = (0..OPEN_MAX + 5)
            .map(|n| request(&format!("p{n}"), "10.0.0.1"))
            .collect();

        let said: Vec<Act> = all.iter().flat_map(|r| questions.change(&added(r))).collect();

        assert_eq!(said.len(), SAID_MAX + 1);
        assert!(matches!(&said[SAID_MAX], Act::Say(line) if line.contains("pending list")));
        assert_eq!(questions.open.len(), SAID_MAX);
        let ended: Vec<Act> = all
            .iter()
            .flat_map(|r| questions.change(&removed(r, v1::PendingState::Expired)))
            .collect();
        assert_eq!(ended, []);
        assert!(
            matches!(&questions.change(&added(&all[0]))[..], [Act::Say(_)]),
            "said again after the flood"
        );
    }
}
