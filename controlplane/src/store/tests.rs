use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, SystemTime};

use super::*;
use crate::lists::described;
use crate::testing::TempDir;

fn event(sequence: u64, kind: v1::EventKind) -> v1::Event {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(sequence);
    v1::Event {
        sequence,
        kind: kind.into(),
        time: Some(time.into()),
        ..Default::default()
    }
}

fn policy(name: &str, revision: u64) -> v1::Policy {
    v1::Policy {
        name: name.to_owned(),
        revision,
        document: format!("# {revision}"),
        ..Default::default()
    }
}

fn grant(id: &str) -> StoredGrant {
    StoredGrant {
        grant: v1::Grant {
            id: id.to_owned(),
            ..Default::default()
        },
        instances: vec!["a/1".to_owned(), "b/2".to_owned()],
        uses: vec![(
            "a/1".to_owned(),
            Budget {
                connections: 1,
                bytes_up: u64::MAX,
                bytes_down: 0,
            },
        )],
    }
}

fn vm() -> StoredVm {
    StoredVm {
        mode: v1::Mode::Quarantine,
        labels: BTreeMap::from([("role".to_owned(), "web".to_owned())]),
        instance: "a/1".to_owned(),
        wanted: "v".to_owned(),
        process: "p".to_owned(),
    }
}

fn exercise(store: &mut dyn Store) {
    let writes = [
        Write::PutGrant(Box::new(grant("g1"))),
        Write::PutGrant(Box::new(grant("g2"))),
        Write::DeleteGrant("g2".to_owned()),
        Write::PutPolicy(policy("default", 1)),
        Write::PutPolicy(policy("default", 2)),
        Write::PutPolicy(policy("web", 1)),
        Write::PutVm("vm".to_owned(), Some(vm())),
        Write::PutVm("gone".to_owned(), Some(vm())),
        Write::PutVm("gone".to_owned(), None),
    ];
    store.apply(&writes).unwrap();
    let events: Vec<_> = (1..=9)
        .map(|n| {
            event(
                n,
                if n % 2 == 0 {
                    v1::EventKind::FlowOpened
                } else {
                    v1::EventKind::FlowClosed
                },
            )
        })
        .collect();
    store.append_events(&events).unwrap();
}

fn check(store: &mut dyn Store) {
    let mut snapshot = store.load().unwrap();
    snapshot.policies.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(snapshot.grants, [grant("g1")]);
    assert_eq!(snapshot.policies, [policy("default", 2), policy("web", 1)]);
    assert_eq!(snapshot.vms, BTreeMap::from([("vm".to_owned(), vm())]));
    assert_eq!(store.policy("default", 1).unwrap(), Some(policy("default", 1)));
    assert_eq!(store.policy("default", 3).unwrap(), None);
    let revisions = |store: &mut dyn Store, before, limit| -> Vec<u64> {
        let found = store.revisions("default", before, limit).unwrap();
        assert!(found.iter().all(|p| p.document.is_empty()));
        found.iter().map(|p| p.revision).collect()
    };
    assert_eq!(revisions(store, 0, 10), [2, 1]);
    assert_eq!(revisions(store, 2, 10), [1]);
    assert_eq!(revisions(store, 0, 1), [2]);

    let found = |store: &mut dyn Store, query: EventQuery| -> Vec<u64> {
        store.events(&query).unwrap().iter().map(|e| e.sequence).collect()
    };
    let all = EventQuery {
        limit: 100,
        ..Default::default()
    };
    let at = |s| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(s));
    assert_eq!(
        found(
            store,
            EventQuery {
                limit: 2,
                ..all.clone()
            }
        ),
        [9, 8]
    );
    assert_eq!(
        found(
            store,
            EventQuery {
                before: 3,
                ..all.clone()
            }
        ),
        [2, 1]
    );
    assert_eq!(
        found(
            store,
            EventQuery {
                after: 7,
                ..all.clone()
            }
        ),
        [9, 8]
    );
    let oldest_first = EventQuery {
        after: 7,
        oldest_first: true,
        limit: 1,
        ..all.clone()
    };
    assert_eq!(found(store, oldest_first), [8]);
    assert_eq!(
        found(
            store,
            EventQuery {
                start: at(3),
                end: at(5),
                ..all.clone()
            }
        ),
        [4, 3]
    );
    let kinds = vec![v1::EventKind::FlowOpened.into()];
    assert_eq!(found(store, EventQuery { kinds, ..all }), [8, 6, 4, 2]);
    assert_eq!(store.open_history().unwrap().last_sequence, 9);
}

#[test]
fn memory_and_sqlite_agree() {
    let mut memory = MemoryStore::default();
    exercise(&mut memory);
    check(&mut memory);

    let dir = TempDir::new();
    let file = dir.path().join("state/s.db");
    let mut sqlite = SqliteStore::open(&file).unwrap();
    exercise(&mut sqlite);
    check(&mut sqlite);
    drop(sqlite);
    check(&mut SqliteStore::open(&file).unwrap());
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file), 0o600);
    assert_eq!(mode(file.parent().unwrap()), 0o700);
}

#[test]
fn a_file_in_use_and_a_newer_schema_are_refused() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let mut first = SqliteStore::open(&file).unwrap();
    let refused = |by: &str| {
        format!(
            "store {} is in use by another controlplane (pid {}{by}); stop it, or give --store another file",
            file.display(),
            std::process::id()
        )
    };
    assert_eq!(SqliteStore::open(&file).unwrap_err().to_string(), refused(""));
    first.sign("unix:///run/vnet/control.sock");
    assert_eq!(
        SqliteStore::open(&file).unwrap_err().to_string(),
        refused(", serving unix:///run/vnet/control.sock")
    );
    drop(first);
    // Where it serves is not what one before it said.
    let second = SqliteStore::open(&file).unwrap();
    assert_eq!(SqliteStore::open(&file).unwrap_err().to_string(), refused(""));
    drop(second);
    let connection = rusqlite::Connection::open(&file).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    assert!(matches!(
        SqliteStore::open(&file),
        Err(StoreError::Newer { found: 99, .. })
    ));
}

#[test]
fn changes_are_made_all_or_none() {
    let dir = TempDir::new();
    let mut store = SqliteStore::open(&dir.path().join("s.db")).unwrap();
    store.apply(&[Write::PutPolicy(policy("default", 1))]).unwrap();
    let twice = [
        Write::PutGrant(Box::new(grant("g1"))),
        Write::PutPolicy(policy("default", 1)),
    ];
    assert!(store.apply(&twice).is_err(), "a revision is never replaced");
    assert_eq!(store.load().unwrap().grants, []);
}

#[tokio::test]
async fn writer_answers_when_durable_and_reads_what_was_left() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let writer = Writer::start(
        Box::new(SqliteStore::open(&file).unwrap()),
        None,
        std::sync::Arc::default(),
    )
    .unwrap();
    writer.event(event(1, v1::EventKind::FlowOpened));
    writer
        .write(vec![Write::PutGrant(Box::new(grant("g1")))])
        .wait()
        .await
        .unwrap();
    let all = EventQuery {
        limit: 10,
        ..Default::default()
    };
    assert_eq!(writer.events(all).await.unwrap().len(), 1);
    writer.event(event(2, v1::EventKind::FlowOpened));
    drop(writer);
    let mut store = SqliteStore::open(&file).unwrap();
    assert_eq!(store.load().unwrap().grants, [grant("g1")]);
    assert_eq!(
        store.open_history().unwrap().last_sequence,
        2,
        "what was left when it ended is recorded"
    );
}

#[test]
fn locations_are_read_and_refused_by_name() {
    assert_eq!("memory:".parse(), Ok(Location::Memory));
    assert_eq!("sqlite:/x/y.db".parse(), Ok(Location::Sqlite("/x/y.db".into())));
    assert!(
        "etcd://h:1"
            .parse::<Location>()
            .unwrap_err()
            .contains("not built yet")
    );
    assert!("sqlite:".parse::<Location>().is_err());
    assert!("postgres://x".parse::<Location>().is_err());
}

#[test]
fn a_list_is_kept_once_however_many_revisions_name_it() {
    let dir = TempDir::new();
    let file = dir.path().join("state.db");
    let list = v1::PolicyList {
        path: "l.txt".to_owned(),
        sha256: "ab".repeat(32),
        content: vec![7; 100_000],
        size_bytes: 100_000,
    };
    let with_list = |revision| v1::Policy {
        lists: vec![list.clone()],
        ..policy("default", revision)
    };
    let mut stores: [Box<dyn Store>; 2] = [
        Box::new(MemoryStore::default()),
        Box::new(SqliteStore::open(&file).unwrap()),
    ];
    for store in &mut stores {
        for revision in 1..=20 {
            store.apply(&[Write::PutPolicy(with_list(revision))]).unwrap();
        }
        assert_eq!(store.policy("default", 3).unwrap(), Some(with_list(3)));
        assert_eq!(store.load().unwrap().policies, [with_list(20)]);
        let listed = store.revisions("default", 0, 50).unwrap();
        assert!(listed.iter().all(|policy| policy.lists[0].content.is_empty()));
    }
    drop(stores);
    let bytes: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(
        bytes < 1_000_000,
        "{bytes} bytes for 20 revisions of one list of 100,000"
    );
}

#[test]
fn lists_go_when_none_of_the_last_revisions_of_any_policy_names_them() {
    let dir = TempDir::new();
    let list = |digest: &str| v1::PolicyList {
        path: "l.txt".to_owned(),
        sha256: digest.repeat(32),
        content: vec![7; 1_000],
        size_bytes: 1_000,
    };
    let with_list = |name: &str, revision, digest: &str| v1::Policy {
        lists: vec![list(digest)],
        ..policy(name, revision)
    };
    for mut store in both(&dir) {
        let mut put = |policy: v1::Policy| store.apply(&[Write::PutPolicy(policy)]).unwrap();
        put(with_list("other", 1, "cc"));
        put(with_list("default", 1, "aa"));
        put(with_list("default", 2, "cc"));
        for revision in 3..=LISTED_REVISIONS_MAX {
            put(with_list("default", revision, "bb"));
        }
        let kept = |store: &mut Box<dyn Store>, name: &str, revision| {
            !store.policy(name, revision).unwrap().unwrap().lists[0]
                .content
                .is_empty()
        };
        assert!(
            kept(&mut store, "default", 1),
            "the last of those that have theirs"
        );
        store
            .apply(&[Write::PutPolicy(with_list(
                "default",
                LISTED_REVISIONS_MAX + 1,
                "bb",
            ))])
            .unwrap();
        assert!(!kept(&mut store, "default", 1));
        store
            .apply(&[Write::PutPolicy(with_list(
                "default",
                LISTED_REVISIONS_MAX + 2,
                "bb",
            ))])
            .unwrap();
        assert!(kept(&mut store, "default", 2), "another policy names it still");
        assert!(kept(&mut store, "other", 1) && kept(&mut store, "default", 3));
        let old = store.policy("default", 1).unwrap().unwrap();
        assert_eq!(
            (old.document, old.lists[0].path.as_str()),
            (policy("default", 1).document, "l.txt")
        );
    }
}

#[test]
fn what_an_unconfirmed_revision_falls_back_to_keeps_its_lists_however_old_it_is() {
    let dir = TempDir::new();
    let list = v1::PolicyList {
        path: "l.txt".to_owned(),
        sha256: "aa".repeat(32),
        content: vec![7; 1_000],
        size_bytes: 1_000,
    };
    let awaiting = |revision| v1::Policy {
        confirm_until: Some(SystemTime::UNIX_EPOCH.into()),
        falls_back_to: 1,
        ..policy("default", revision)
    };
    let fallback = v1::Policy {
        lists: vec![list.clone()],
        ..policy("default", 1)
    };
    for mut store in both(&dir) {
        let mut put = |policy: v1::Policy| store.apply(&[Write::PutPolicy(policy)]).unwrap();
        put(fallback.clone());
        let last = LISTED_REVISIONS_MAX + 4;
        for revision in 2..=last {
            put(awaiting(revision));
            put(policy("other", revision));
        }
        assert_eq!(store.load().unwrap().fallbacks, std::slice::from_ref(&fallback));

        // It comes back: as a revision of its own, which names the list and does not bring it.
        let back = v1::Policy {
            revision: last + 1,
            ..fallback.clone()
        };
        let without_content = v1::Policy {
            lists: described(&back.lists),
            ..back.clone()
        };
        store.apply(&[Write::PutPolicy(without_content)]).unwrap();
        store
            .apply(&[Write::PutPolicy(policy("other", last + 1))])
            .unwrap();
        let snapshot = store.load().unwrap();
        assert!(snapshot.policies.contains(&back), "{:?}", snapshot.policies);
        assert_eq!(snapshot.fallbacks, []);

        // Nothing awaits anything any more: it goes with the last that names it.
        for revision in last + 2..=last + 1 + LISTED_REVISIONS_MAX {
            store
                .apply(&[Write::PutPolicy(policy("default", revision))])
                .unwrap();
        }
        let old = store.policy("default", last + 1).unwrap().unwrap();
        assert_eq!(old.lists, described(&back.lists));
    }
}

fn traffic(sequence: u64, vm: &str) -> v1::Event {
    v1::Event {
        vm: vm.to_owned(),
        ..event(sequence, v1::EventKind::FlowDenied)
    }
}

/// Both stores, with what keeps the second one's file.
fn both(dir: &TempDir) -> [Box<dyn Store>; 2] {
    [
        Box::new(MemoryStore::default()),
        Box::new(SqliteStore::open(&dir.path().join("s.db")).unwrap()),
    ]
}

fn append(store: &mut dyn Store, events: &[v1::Event]) -> u64 {
    events
        .chunks(10_000)
        .map(|chunk| store.append_events(chunk).unwrap())
        .sum()
}

fn kept(store: &mut dyn Store, which: impl Fn(&v1::Event) -> bool) -> Vec<u64> {
    let all = EventQuery {
        limit: usize::MAX >> 1,
        oldest_first: true,
        ..Default::default()
    };
    let events = store.events(&all).unwrap();
    events.iter().filter(|e| which(e)).map(|e| e.sequence).collect()
}

#[test]
fn one_vm_pushes_out_neither_anothers_traffic_nor_what_people_did() {
    for mut store in both(&TempDir::new()) {
        let store = store.as_mut();
        let answered = v1::Event {
            action: v1::Action::Allow.into(),
            vm: "flood".to_owned(),
            ..event(3, v1::EventKind::PendingClosed)
        };
        let first = [
            event(1, v1::EventKind::GrantCreated),
            traffic(2, "quiet"),
            answered,
            event(4, v1::EventKind::VmAttached),
        ];
        assert_eq!(append(store, &first), 0);
        let many = HISTORY_TRAFFIC_PER_VM_MAX + 1_000;
        let flood: Vec<_> = (5..5 + many).map(|n| traffic(n, "flood")).collect();

        assert_eq!(append(store, &flood), 1_000, "what goes is counted");

        let flooded = kept(store, |e| {
            e.vm == "flood" && e.kind() == v1::EventKind::FlowDenied
        });
        assert_eq!(flooded.len() as u64, HISTORY_TRAFFIC_PER_VM_MAX);
        assert_eq!(flooded[0], 5 + 1_000, "the oldest go first");
        assert_eq!(kept(store, |e| e.sequence <= 4), [1, 2, 3, 4]);
        assert_eq!(store.open_history().unwrap().last_sequence, 4 + many);
    }
}

#[test]
fn many_vms_together_push_out_the_oldest_traffic_and_no_act() {
    for mut store in both(&TempDir::new()) {
        let store = store.as_mut();
        append(store, &[event(1, v1::EventKind::PolicyApplied)]);
        let flood: Vec<_> = (2..HISTORY_TRAFFIC_MAX + 12)
            .map(|n| traffic(n, &format!("vm{}", n % 10)))
            .collect();

        assert_eq!(append(store, &flood), 10);

        let traffic = kept(store, |e| e.kind() == v1::EventKind::FlowDenied);
        assert_eq!((traffic.len() as u64, traffic[0]), (HISTORY_TRAFFIC_MAX, 12));
        assert_eq!(kept(store, |e| e.kind() == v1::EventKind::PolicyApplied), [1]);
    }
}

#[test]
fn acts_and_presence_have_limits_too() {
    for mut store in both(&TempDir::new()) {
        let store = store.as_mut();
        let mut next = 0;
        for (kind, limit) in [
            (v1::EventKind::GrantEnded, HISTORY_ACTS_MAX),
            (v1::EventKind::VmDetached, HISTORY_PRESENCE_MAX),
        ] {
            let events: Vec<_> = (0..limit + 3).map(|n| event(next + 1 + n, kind)).collect();
            let first = next + 1;
            next += limit + 3;
            assert_eq!(append(store, &events), 3);
            let left = kept(store, |e| e.kind() == kind);
            assert_eq!((left.len() as u64, left[0]), (limit, first + 3));
        }
    }
}

#[test]
fn what_is_kept_is_counted_anew_after_a_restart() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let half: Vec<_> = (1..=HISTORY_TRAFFIC_PER_VM_MAX)
        .map(|n| traffic(n, "web"))
        .collect();
    append(&mut SqliteStore::open(&file).unwrap(), &half);
    let mut store = SqliteStore::open(&file).unwrap();
    let next = HISTORY_TRAFFIC_PER_VM_MAX + 1;
    assert_eq!(append(&mut store, &[traffic(next, "web")]), 1);
    assert_eq!(kept(&mut store, |_| true)[0], 2);
}

#[test]
fn the_history_of_the_first_schema_is_sorted_when_it_is_opened() {
    use prost::Message as _;
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let connection = rusqlite::Connection::open(&file).unwrap();
    connection.execute_batch(schema::MIGRATIONS[0].sql).unwrap();
    connection.pragma_update(None, "user_version", 1).unwrap();
    let many = HISTORY_TRAFFIC_PER_VM_MAX + 10;
    let old = (1..=many).map(|n| traffic(n, "web"));
    connection.execute_batch("BEGIN").unwrap();
    for event in old.chain([event(many + 1, v1::EventKind::GrantCreated)]) {
        connection
            .execute(
                "INSERT INTO events (sequence, time_us, kind, message) VALUES (?1, 0, ?2, ?3)",
                rusqlite::params![event.sequence as i64, event.kind, event.encode_to_vec()],
            )
            .unwrap();
    }
    connection.execute_batch("COMMIT").unwrap();
    drop(connection);

    let mut store = SqliteStore::open(&file).unwrap();
    assert_eq!(append(&mut store, &[traffic(many + 2, "web")]), 11);
    let grants = kept(&mut store, |e| e.kind() == v1::EventKind::GrantCreated);
    assert_eq!(grants, [many + 1]);
    assert_eq!(
        kept(&mut store, |e| e.vm == "web").len() as u64,
        HISTORY_TRAFFIC_PER_VM_MAX
    );
}

/// A disk that writes no event until it is let.
struct Stuck {
    store: MemoryStore,
    go: std::sync::mpsc::Receiver<()>,
}

impl Store for Stuck {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.store.load()
    }
    fn apply(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        self.store.apply(writes)
    }
    fn policy(&mut self, name: &str, revision: u64) -> Result<Option<v1::Policy>, StoreError> {
        self.store.policy(name, revision)
    }
    fn revisions(&mut self, name: &str, before: u64, limit: usize) -> Result<Vec<v1::Policy>, StoreError> {
        self.store.revisions(name, before, limit)
    }
    fn append_events(&mut self, events: &[v1::Event]) -> Result<u64, StoreError> {
        // An error is that nobody holds it back any more.
        let _ = self.go.recv();
        self.store.append_events(events)
    }
    fn events(&mut self, query: &EventQuery) -> Result<Vec<v1::Event>, StoreError> {
        self.store.events(query)
    }
    fn open_history(&mut self) -> Result<History, StoreError> {
        self.store.open_history()
    }
    fn close_history(&mut self) -> Result<(), StoreError> {
        self.store.close_history()
    }
}

#[tokio::test]
async fn a_flood_of_traffic_leaves_room_in_the_queue_for_what_people_do() {
    let (go, held_back) = std::sync::mpsc::channel();
    let stuck = Stuck {
        store: MemoryStore::default(),
        go: held_back,
    };
    let metrics = std::sync::Arc::new(crate::metrics::Metrics::default());
    let writer = Writer::start(Box::new(stuck), None, std::sync::Arc::clone(&metrics)).unwrap();
    let flood = (writer::QUEUED_TRAFFIC_MAX + writer::EVENT_BATCH + 500) as u64;
    for n in 1..=flood {
        writer.event(traffic(n, "web"));
    }
    let lost = metrics.events_unrecorded.get();
    assert!(lost >= 500, "{lost} lost");

    writer.event(event(flood + 1, v1::EventKind::GrantCreated));
    let saved = writer.write(vec![Write::PutGrant(Box::new(grant("g1")))]);
    assert_eq!(metrics.events_unrecorded.get(), lost, "there is room for it");
    drop(go);
    saved.wait().await.unwrap();
    let newest = EventQuery {
        limit: 1,
        ..Default::default()
    };
    assert_eq!(writer.events(newest).await.unwrap()[0].sequence, flood + 1);
}

#[test]
fn a_file_that_is_damaged_or_no_store_is_named_with_the_remedy() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    std::fs::write(&file, "this is no database, however long it is\n".repeat(500)).unwrap();

    let error = SqliteStore::open(&file).unwrap_err();

    let text = error.to_string();
    assert!(matches!(error, StoreError::Unusable { .. }), "{text}");
    for part in [&*file.to_string_lossy(), "not a database", "move it away", "-wal"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

#[test]
fn a_full_disk_is_named_as_one() {
    let dir = TempDir::new();
    let mut store = SqliteStore::open(&dir.path().join("s.db")).unwrap();
    // The file may not grow: what SQLite says is what it says of a full disk.
    store.forbid_growth();
    let grants = (0..2_000).map(|n| Write::PutGrant(Box::new(grant(&format!("g{n}")))));

    let error = store.apply(&grants.collect::<Vec<_>>()).unwrap_err();

    let text = error.to_string();
    assert!(
        text.contains("disk is full") && text.contains("make room"),
        "{text}"
    );
    assert!(text.starts_with("the store failed: "), "{text}");
    assert_eq!(store.load().unwrap().grants, [], "nothing is half done");
}
