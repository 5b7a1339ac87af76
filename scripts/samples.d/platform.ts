// The calls of the platform's client that this service answers, with the types
// that the contract declares for them, in strict TypeScript. The compiler holds the
// calls to the types; shape() holds the answers to them, field by field.
// usage: node platform.js URL ORG TOKEN NODE-IP SIGNATURE TIMESTAMP, after a node
// has the organization's key. It prints what is wrong, and exits 1 then.

type Context =
  | 'workspace' | 'bucket' | 'repo' | 'user' | 'org' | 'workspaceuser' | 'apikey' | 'usersettings' | 'orgsettings'
  | 'flashbacknode' | 'orgkey' | 'aillm' | 'aillmapikey' | 'conversation';
type Change = 'created' | 'updated' | 'deleted';

interface EventQuery {
  from_timestamp?: string;
  to_timestamp?: string;
  contextId?: string;
  context?: number;
  event?: number;
  userId?: string;
  workspaceId?: string;
  showUnread?: boolean;
  skip: number;
  take: number;
}
interface SystemEvent {
  id: number;
  timestamp: string;
  contextId: string;
  context: Context;
  event: Change;
  orgId: string;
  userId: string;
  userName: string;
  userEmail: string;
  workspaceId: string | null;
  jsonData: string | null;
  showUnread: boolean;
}
interface EventPage { events: SystemEvent[]; total: number; skip: number; take: number }
interface Marked { success: boolean }
interface Done { success: boolean; message: string }
interface OrgKey { id: string; orgId: string; publicKey: string; createdAt: string; nodeKeys: { keyId: string; nodeId: string }[] }
interface OrgKeys { success: boolean; message: string; data?: OrgKey[] }
interface Registration {
  ip: string; region: string; timestamp: number; signature: string; id_org?: string;
  provider: string; status: string; version: string; nodeServices?: number;
}
interface Node {
  id: string; ip: string; region: string; version: string; status: string; url: string;
  id_org?: string; nodeServices: number; lastUpdated: string;
}
interface Nodes { success: true; data: Node[]; total: number }

class Client {
  constructor(private baseUrl: string, private token: string) {}

  private async request<T>(path: string, method: string, data?: object): Promise<T> {
    const headers: Record<string, string> = { Authorization: `Bearer ${this.token}` };
    if (data) headers['Content-Type'] = 'application/json';
    const response = await fetch(`${this.baseUrl}/${path}`, { method, headers, body: data ? JSON.stringify(data) : null });
    const text = await response.text();
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${text}`);
    return JSON.parse(text) as T;
  }

  private marks = (ids: number | number[]) => (Array.isArray(ids) ? { ids } : { id: ids });

  generateOrgKey = (org: string) => this.request<string>(`organization/${org}/key`, 'POST');
  getOrgKeys = (org: string) => this.request<OrgKeys>(`organization/${org}/key`, 'GET');
  deleteOrgKey = (org: string, id: string) => this.request<Done>(`organization/${org}/key/${id}`, 'DELETE');
  deleteOrgKeys = (org: string) => this.request<Done>(`organization/${org}/key`, 'DELETE');
  nodeRegister = (r: Registration) => this.request<Done>('register', 'POST', r);
  nodeUnregister = (r: Registration) => this.request<Done>('unregister', 'POST', r);
  getNodes = (services: number) => this.request<Nodes>(`node?nodeServices=${services}`, 'GET');
  getOrgNodes = (org: string) => this.request<Nodes>(`organization/${org}/nodes`, 'GET');
  deleteNode = (org: string, id: string) => this.request<Done>(`organization/${org}/node/${id}`, 'DELETE');
  getSystemEvents = (q: EventQuery) => this.request<EventPage>('systemevent', 'POST', q);
  markAsRead = (ids: number | number[]) => this.request<Marked>('systemevent/read', 'POST', this.marks(ids));
  markAsUnread = (ids: number | number[]) => this.request<Marked>('systemevent/read', 'DELETE', this.marks(ids));
}

const contexts: Context[] = [
  'workspace', 'bucket', 'repo', 'user', 'org', 'workspaceuser', 'apikey', 'usersettings', 'orgsettings',
  'flashbacknode', 'orgkey', 'aillm', 'aillmapikey', 'conversation',
];
const changes: Change[] = ['created', 'updated', 'deleted'];

let wrong = 0;
const check = (ok: boolean, what: string): void => {
  if (!ok) {
    wrong++;
    console.log(what);
  }
};

type Check = (v: unknown) => boolean;
const text: Check = v => typeof v === 'string';
const whole: Check = v => Number.isSafeInteger(v);
const flag: Check = v => typeof v === 'boolean';
const orNull = (c: Check): Check => v => v === null || c(v);
const one = (all: string[]): Check => v => typeof v === 'string' && all.includes(v);
const list = (fields: Record<string, Check>, what: string): Check => v =>
  Array.isArray(v) && v.every(e => shape(e, fields, what));

const shape = (value: unknown, fields: Record<string, Check>, what: string): boolean => {
  const object = value as Record<string, unknown>;
  for (const [name, is] of Object.entries(fields)) {
    check(is(object[name]), `${what}.${name} is ${JSON.stringify(object[name])}`);
  }
  return true;
};

const eventFields = {
  id: whole, timestamp: text, contextId: text, context: one(contexts), event: one(changes), orgId: text, userId: text,
  userName: text, userEmail: text, workspaceId: orNull(text), jsonData: orNull(text), showUnread: flag,
};
const pageFields = { events: list(eventFields, 'event'), total: whole, skip: whole, take: whole };
const nodeFields = {
  id: text, ip: text, region: text, version: text, status: text, url: text, id_org: text, nodeServices: whole, lastUpdated: text,
};
const nodesFields = { success: flag, data: list(nodeFields, 'node'), total: whole };
const keysFields = {
  success: flag, message: text,
  data: list({ id: text, orgId: text, publicKey: text, createdAt: text, nodeKeys: list({ keyId: text, nodeId: text }, 'nodeKey') }, 'key'),
};
const doneFields = { success: flag, message: text };

async function keysAndNodes(c: Client, org: string, registration: Registration): Promise<void> {
  check((await c.generateOrgKey(org)).startsWith('-----BEGIN RSA PRIVATE KEY-----'), 'generateOrgKey is no PEM');
  const keys = await c.getOrgKeys(org);
  shape(keys, keysFields, 'keys');
  check(keys.data?.length === 2, `${keys.data?.length} keys, not 2`);
  shape(await c.deleteOrgKey(org, keys.data![0].id), doneFields, 'deleteOrgKey');

  shape(await c.nodeRegister(registration), doneFields, 'nodeRegister');
  for (const [services, found] of [[0, 1], [1, 1], [4, 1], [5, 1], [2, 0], [7, 0]]) {
    const nodes = await c.getNodes(services);
    shape(nodes, nodesFields, 'nodes');
    check(nodes.total === found && nodes.data.length === found, `nodeServices=${services}: ${nodes.total} nodes, not ${found}`);
  }
  const nodes = await c.getOrgNodes(org);
  shape(nodes, nodesFields, 'nodes');
  check(nodes.data[0].nodeServices === registration.nodeServices, 'the node has other services');
  shape(await c.deleteNode(org, nodes.data[0].id), doneFields, 'deleteNode');
}

async function events(c: Client, org: string): Promise<void> {
  const all = { skip: 0, take: 100 };
  const page = await c.getSystemEvents(all);
  shape(page, pageFields, 'page');
  const seen = page.events.map(e => `${e.context}/${e.event}`);
  for (const event of ['orgkey/created', 'orgkey/updated', 'orgkey/deleted', 'flashbacknode/created', 'flashbacknode/deleted']) {
    check(seen.includes(event), `no event ${event} in ${seen}`);
  }
  check(page.events.every(e => e.showUnread && e.orgId === org && e.workspaceId === null), 'an event is read, or of another organization or workspace');

  const ids = page.events.map(e => e.id);
  check(new Set(ids).size === ids.length, 'ids are not unique');
  shape(await c.markAsRead(ids[0]), { success: flag }, 'markAsRead');
  shape(await c.markAsRead(ids.slice(1, 3)), { success: flag }, 'markAsRead');
  const unread = async () => (await c.getSystemEvents({ ...all, showUnread: true })).events.map(e => e.id);
  check(String(await unread()) === String(ids.slice(3)), 'showUnread does not leave out what was read');
  check((await c.getSystemEvents(all)).events.filter(e => !e.showUnread).length === 3, 'showUnread is not false for what was read');
  shape(await c.markAsUnread([ids[0], ids[1]]), { success: flag }, 'markAsUnread');
  shape(await c.markAsUnread(ids[2]), { success: flag }, 'markAsUnread');
  check(String(await unread()) === String(ids), 'markAsUnread does not undo markAsRead');

  const count = async (q: Partial<EventQuery>) => (await c.getSystemEvents({ ...all, ...q })).total;
  for (let context = 0; context < contexts.length; context++) {
    const expected = page.events.filter(e => e.context === contexts[context]).length;
    check((await count({ context })) === expected, `context ${context}: not ${expected} events`);
  }
  for (let event = 0; event < changes.length; event++) {
    const expected = page.events.filter(e => e.event === changes[event]).length;
    check((await count({ event })) === expected, `event ${event}: not ${expected} events`);
  }
  const first = page.events[page.events.length - 1];
  check((await count({ contextId: first.contextId })) >= 1, 'contextId finds nothing');
  check((await count({ userId: first.userId })) >= 1 && (await count({ userId: 'nobody' })) === 0, 'userId does not filter');
  check((await count({ workspaceId: 'w-1' })) === 0, 'workspaceId does not filter');
  check((await count({ from_timestamp: '1970-01-01T00:00:00.000Z', to_timestamp: '2020-01-01T00:00:00.000Z' })) === 0, 'the window does not filter');
  check((await c.getSystemEvents({ skip: 1, take: 1 })).events[0].id === ids[1], 'skip does not skip');
}

export async function run(url: string, org: string, token: string, registration: Registration): Promise<void> {
  const c = new Client(url, token);
  await keysAndNodes(c, org, registration);
  await events(c, org);
  shape(await c.deleteOrgKeys(org), doneFields, 'deleteOrgKeys');
  if (wrong) throw new Error(`${wrong} answers are not as the client declares them`);
}
