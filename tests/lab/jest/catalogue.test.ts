import * as fs from 'fs';
import * as path from 'path';
import ts from 'typescript';

/** What the catalogue of messages has, and what the source says: the same. labextension/README.md has the command that writes it. */

const LAB = path.resolve(__dirname, '../../../labextension');
const CATALOGUE = path.join(LAB, 'nbgpu_lab/locale/nbgpu_lab.pot');
const TOLD = ['aria-label', 'title', 'placeholder', 'label', 'alt'];

/** "context|message" of all entries, plurals as entries of their own. */
function catalogue(): Set<string> {
  const found = new Set<string>();
  for (const entry of fs.readFileSync(CATALOGUE, 'utf8').split('\n\n')) {
    const parts: { [name: string]: string } = {};
    let last = '';
    for (const line of entry.split('\n')) {
      const match = /^(msgctxt|msgid_plural|msgid|msgstr\S*)? ?(".*")$/.exec(line); // prettier-ignore
      if (match) {
        last = match[1] ?? last;
        parts[last] = (parts[last] ?? '') + JSON.parse(match[2]);
      }
    }
    for (const message of [parts.msgid, parts.msgid_plural]) {
      if (message) {
        found.add(`${parts.msgctxt ?? ''}|${message}`);
      }
    }
  }
  return found;
}

function walk(node: ts.Node, see: (node: ts.Node) => void): void {
  see(node);
  node.forEachChild(child => walk(child, see));
}

const messages = new Set<string>();
const odd: string[] = [];

beforeAll(() => {
  for (const name of fs.readdirSync(path.join(LAB, 'src'))) {
    const text = fs.readFileSync(path.join(LAB, 'src', name), 'utf8');
    const file = ts.createSourceFile(name, text, ts.ScriptTarget.Latest, true);
    const where = (node: ts.Node) => `${name}: ${node.getText(file)}`;
    walk(file, node => {
      if (
        ts.isCallExpression(node) &&
        ts.isPropertyAccessExpression(node.expression) &&
        ['__', '_n'].includes(node.expression.name.text)
      ) {
        const count = node.expression.name.text === '_n' ? 2 : 1;
        for (const message of node.arguments.slice(0, count)) {
          if (ts.isStringLiteral(message)) {
            messages.add(`|${message.text}`);
          } else {
            odd.push(where(node));
          }
        }
      } else if (ts.isJsxText(node) && /\p{L}{2}/u.test(node.text)) {
        odd.push(where(node));
      } else if (
        ts.isJsxAttribute(node) &&
        TOLD.includes(node.name.getText(file)) &&
        node.initializer &&
        ts.isStringLiteral(node.initializer)
      ) {
        odd.push(where(node));
      }
    });
  }
  const schema = JSON.parse(
    fs.readFileSync(path.join(LAB, 'schema/model.json'), 'utf8')
  );
  messages.add(`schema|${schema.title}`);
  messages.add(`schema|${schema.description}`);
  messages.add(`settings|${schema['jupyter.lab.setting-icon-label']}`);
  for (const property of Object.values<any>(schema.properties)) {
    messages.add(`settings|${property.title}`);
    messages.add(`settings|${property.description}`);
  }
});

test('all that the source says is in the catalogue', () => {
  const known = catalogue();
  expect([...messages].filter(message => !known.has(message))).toEqual([]);
  expect(messages.size).toBeGreaterThan(100);
});

test('nothing is in the catalogue that nobody says', () => {
  expect([...catalogue()].filter(message => !messages.has(message))).toEqual(
    []
  );
});

test('no text goes past the translator', () => {
  expect(odd).toEqual([]);
});
