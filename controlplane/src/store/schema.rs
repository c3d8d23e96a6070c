//! The SQLite schema: its versions, and the steps from each to the next.
//!
//! `PRAGMA user_version` holds the version. A step is never changed once released: a newer version
//! adds one.

use prost::Message as _;
use rusqlite::{Transaction, params};
use vnet_proto::v1;

use super::{Class, StoreError};

/// Each step takes the schema from its index to the next version.
pub(super) const MIGRATIONS: &[Step] = &[
    Step {
        sql: FIRST,
        then: None,
    },
    Step {
        sql: CLASSES,
        then: Some(sort_events),
    },
    Step {
        sql: LISTS,
        then: None,
    },
    Step {
        sql: USES,
        then: None,
    },
    Step {
        sql: LIST_USES,
        then: Some(note_list_uses),
    },
    Step {
        sql: OPENED,
        then: None,
    },
    Step {
        sql: NAMES,
        then: None,
    },
];

/// The version that this program writes.
pub(super) const VERSION: u32 = MIGRATIONS.len() as u32;

/// One step: what SQL can do, then what it cannot. All of it happens, or nothing.
pub(super) struct Step {
    pub(super) sql: &'static str,
    pub(super) then: Option<Then>,
}

type Then = fn(&Transaction<'_>) -> Result<(), StoreError>;

const FIRST: &str = "
    CREATE TABLE grants (
        id        TEXT PRIMARY KEY,
        message   BLOB NOT NULL,             -- vnet.v1.Grant
        instances TEXT NOT NULL              -- one attachment a line
    ) STRICT;
    CREATE TABLE policies (
        name     TEXT NOT NULL,
        revision INTEGER NOT NULL,
        message  BLOB NOT NULL,              -- vnet.v1.Policy
        PRIMARY KEY (name, revision)
    ) STRICT;
    CREATE TABLE vms (
        name     TEXT PRIMARY KEY,
        mode     INTEGER NOT NULL,           -- vnet.v1.Mode
        labels   TEXT NOT NULL,              -- a JSON object
        instance TEXT NOT NULL
    ) STRICT;
    CREATE TABLE events (
        sequence INTEGER PRIMARY KEY,
        time_us  INTEGER NOT NULL,           -- since 1970, in microseconds
        kind     INTEGER NOT NULL,           -- vnet.v1.EventKind
        message  BLOB NOT NULL               -- vnet.v1.Event
    ) STRICT;
    CREATE INDEX events_by_kind ON events (kind, sequence);
";

const LISTS: &str = "
    CREATE TABLE lists (
        sha256  TEXT PRIMARY KEY,            -- of the list's content, as vnet.v1.PolicyList says it
        content BLOB NOT NULL                -- compressed; once, however many revisions name it
    ) STRICT;
";

const LIST_USES: &str = "
    CREATE TABLE list_uses (
        name     TEXT NOT NULL,              -- a policy
        revision INTEGER NOT NULL,           -- one of its last
        sha256   TEXT NOT NULL,              -- a list that it names
        PRIMARY KEY (name, revision, sha256)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX list_uses_by_list ON list_uses (sha256);
";

const OPENED: &str = "
    CREATE TABLE history_opened (            -- a row while a controlplane has the history open
        one INTEGER PRIMARY KEY CHECK (one = 1)
    ) STRICT;
";

const NAMES: &str = "
    ALTER TABLE vms ADD COLUMN wanted  TEXT NOT NULL DEFAULT '';     -- a name that another VM had
    ALTER TABLE vms ADD COLUMN process TEXT NOT NULL DEFAULT '';     -- the dataplane's; process::mark
";

/// Gives revisions of before their entries.
fn note_list_uses(transaction: &Transaction<'_>) -> Result<(), StoreError> {
    let mut read = transaction.prepare("SELECT name, revision, message FROM policies")?;
    let mut note = transaction
        .prepare("INSERT OR IGNORE INTO list_uses (name, revision, sha256) VALUES (?1, ?2, ?3)")?;
    let mut rows = read.query([])?;
    while let Some(row) = rows.next()? {
        let message = row.get_ref(2)?.as_blob().map_err(rusqlite::Error::from)?;
        let policy = v1::Policy::decode(message).map_err(|source| StoreError::Damaged {
            table: "policies",
            source,
        })?;
        let (name, revision): (String, i64) = (row.get(0)?, row.get(1)?);
        for list in &policy.lists {
            note.execute(params![name, revision, list.sha256])?;
        }
    }
    Ok(())
}

const CLASSES: &str = "
    ALTER TABLE events ADD COLUMN class INTEGER NOT NULL DEFAULT 2;  -- store::Class
    ALTER TABLE events ADD COLUMN vm TEXT NOT NULL DEFAULT '';
    CREATE INDEX events_by_class ON events (class, sequence);
    CREATE INDEX events_by_vm ON events (class, vm, sequence);
";

const USES: &str = "
    ALTER TABLE grants ADD COLUMN uses TEXT NOT NULL DEFAULT '';     -- one attachment a line, after three sums
";

/// Gives events of before the class and the VM that their messages say.
fn sort_events(transaction: &Transaction<'_>) -> Result<(), StoreError> {
    let mut read = transaction.prepare("SELECT sequence, message FROM events")?;
    let mut sort = transaction.prepare("UPDATE events SET class = ?2, vm = ?3 WHERE sequence = ?1")?;
    let mut rows = read.query([])?;
    let mut events: Vec<(i64, Class, String)> = Vec::new();
    while let Some(row) = rows.next()? {
        let message = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
        let event = v1::Event::decode(message).map_err(|source| StoreError::Damaged {
            table: "events",
            source,
        })?;
        events.push((row.get(0)?, Class::of(&event), event.vm));
    }
    for (sequence, class, vm) in events {
        sort.execute(params![sequence, class as i64, vm])?;
    }
    Ok(())
}
